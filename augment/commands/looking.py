"""Banks and shards looked at: ``evaluate``, ``report``, ``explore``."""

from pathlib import Path
from typing import Any

from augment.commands.common import Record, recipe_of
from augment.core.errors import UserError
from augment.sources import Source


def evaluate(
    path: str,
    real: Source | str | None = None,
    network: str | None = None,
    weights: str = "",
    channels: int | None = None,
    resolution: int | None = None,
    bootstrap: int = 100,
    backbone: str | None = None,
    out: str | None = None,
    device: str | None = None,
) -> Record:
    """Measure the health of a bank, or the quality of synthetic images.

    Args:
        path: a bank, whose latents are compared with white noise; or shards or a folder of images
            by class, which are compared with real ones.
        real: for images, the real ones: a folder, or another source as for invert; for a bank,
            if 16 images a class are to be sampled back, those that it was made of.
        network: for images, whose features to compare: fashion (embedded: grey clothes), clip,
            inception (torch-fidelity's), or a network of timm such as resnet50; by default that of
            a checkpoint.
        weights: of the network: a .safetensors file, a state dict, or a checkpoint of
            latent-augment train; by default those that it is known with.
        channels: of the images, 1 or 3; by default as the first synthetic one.
        resolution: to which images are brought; by default that of the first synthetic one.
        bootstrap: draws for the intervals of FID and KID; 0 leaves them out.
        backbone: of a bank, where it is not as it was.
        out: folder to write evaluation.json, classes.csv and a plot to.
        device: such as cuda or cpu; by default the GPU if there is one.
    """
    from augment.bank.bank import LatentBank
    from augment.diffusion import find_device, load_backbone
    from augment.networks import feature_network
    from augment.report import evaluate as study
    from augment.sources import as_source

    if (Path(path) / "manifest.json").exists():
        bank = LatentBank.open(path)
        model = None if real is None else load_backbone(**recipe_of(bank, backbone), device=device)
        source = None if real is None else as_source(real)
        found = study.evaluate_bank(bank, model, source)
    else:
        if real is None or not (network or weights):
            raise UserError(
                "expected --real, images to compare with, and --network, eyes to see them by, such "
                "as fashion or resnet50, got none; only a bank is evaluated alone"
            )
        fake = study.open_images(path)
        first = study.form_of(fake)
        eyes = feature_network(network or "", weights, find_device(device))
        form = (channels or first[0], resolution or first[1])
        found = study.evaluate_images(fake, as_source(real), eyes, form, bootstrap)
    print(found)
    if out:
        found.write(out)
        print(f"\n{out}: evaluation.json, classes.csv, evaluation.png")
    return found.record()


def report(
    bank: str,
    shards: str | None = None,
    out: str = "report.html",
    rules: str = "lin/0,fix/0,fix/chm,fade/chm",
    classes: int = 50,
    images: Source | str | None = None,
    pool: str | None = None,
    backbone: str | None = None,
    device: str | None = None,
) -> Record:
    """Write an HTML report of a bank: its classes, its health, and what each rule makes of it.

    Args:
        bank: folder of the bank.
        shards: folder of synthetic images made with it, finished or not.
        out: the file, which needs no other and no network.
        rules: whose centroids to compare, with commas between; '' makes no images, and so needs no
            backbone.
        classes: of how many classes to make images, from the most biased to the least.
        images: the real images, a folder or another source as for invert; by default where they
            were.
        pool: file of a replay pool, for its throughput and reuse.
        backbone: the diffusion model; by default the one that made the bank.
        device: such as cuda or cpu; by default the GPU if there is one.
    """
    from augment.bank.bank import LatentBank
    from augment.centroid import Rule
    from augment.diffusion import load_backbone
    from augment.report import write_report
    from augment.report.again import command

    opened, names = LatentBank.open(bank), [name for name in rules.split(",") if name]
    given = {"bank": bank, "shards": shards, "out": out, "rules": rules, "classes": classes}
    told = command("report", {**given, "images": images, "pool": pool, "backbone": backbone})
    for name in names:
        Rule.parse(name)  # what can be refused is refused before gigabytes are loaded
    model = load_backbone(**recipe_of(opened, backbone), device=device) if names else None
    write_report(opened, out, shards, model, names, classes, images, pool, told)
    print(f"{out}: written; open it in a browser")
    return {"report": out}


def explore(
    bank: str,
    out: str | None = None,
    images: Source | str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    backbone: str | None = None,
    device: str | None = None,
) -> None:
    """Serve a page to mix a bank's latents by hand, compare rules, and walk between images.

    Args:
        bank: folder of the bank.
        out: folder that images chosen on the page may be exported to, as shards.
        images: the bank's real images, a folder or another source as for invert; by default where
            they were.
        host: address to serve at; by default this machine alone can see the page.
        port: of the address.
        backbone: the diffusion model; by default the one that made the bank.
        device: such as cuda or cpu; by default the GPU if there is one.
    """
    from augment.bank.bank import LatentBank
    from augment.diffusion import load_backbone
    from augment.explore.server import require, serve
    from augment.explore.session import Explorer
    from augment.sources import place_of

    require()  # before gigabytes are loaded
    opened = LatentBank.open(bank)
    recipe: dict[str, Any] = {
        **recipe_of(opened, backbone),
        **({"device": device} if device else {}),
    }
    source, folder = place_of(images), None if out is None else Path(out)
    page = serve(Explorer(opened, load_backbone(**recipe), recipe, source, folder), host, port)
    print(f"http://{host}:{port}: the explorer of {bank}; Ctrl-C ends it", flush=True)
    page.block_thread()
