"""The page: gradio's blocks around the pieces of `augment.explore.widgets`.

Every action on the page makes a new mixture or changes how it is sampled; then both images are
made, the left one first, and each is shown once it is there. While one is made, only the last of
further actions is kept.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from augment.centroid import MEANS, NORMS, WALKS
from augment.core.errors import UserError
from augment.diffusion.sampling import PROFILES
from augment.diffusion.solver import SOLVERS
from augment.explore import widgets
from augment.explore.export import export
from augment.explore.session import Choice, Explorer, reweighted, toggled
from augment.plan.plan import Plan

Mixture = tuple[Plan, float | None]
"""A plan, and the alpha that it was drawn with as in `Choice`."""
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
BY_HAND = "# What was set by hand has no command: take the Python lines, or draw without a prompt."
MAX_STEPS = 100  # that can be undone


def remembered(history: list[Mixture], mixture: Mixture) -> list[Mixture]:
    """Return a history with a mixture more; weights that are dragged on are one step.

    >>> plan = Plan(0, "ant", ("a", "b"), (0.5, 0.5), 0.0, 0, 0, 0)
    >>> start, *dragged = [(replace(plan, weights=(w, 1 - w)), None) for w in (0.5, 0.6, 0.7)]
    >>> history = [start]
    >>> for mixture in dragged:
    ...     history = remembered(history, mixture)
    >>> [plan.weights[0] for plan, _ in history]
    [0.5, 0.7]
    """
    if mixture == history[-1]:
        return history

    def apart(mixture: Mixture) -> Mixture:
        return replace(mixture[0], weights=()), mixture[1]

    last = [apart(known) for known in history[-2:]]
    dragged = mixture[1] is None and last == [apart(mixture)] * 2
    return [*(history[:-1] if dragged else history), mixture][-MAX_STEPS:]


class Page:
    """The page of an explorer, as gradio's blocks; see `serve`.

    Args:
        explorer: what makes the images.
    """

    def __init__(self, explorer: Explorer) -> None:
        import gradio  # type: ignore[import-not-found]

        self.gr, self.explorer, self.bank = gradio, explorer, explorer.bank
        self.named = {widgets.shown(name): name for name in self.bank.classes}
        with gradio.Blocks(
            title="latent-augment", analytics_enabled=False, fill_width=True
        ) as self.blocks:
            first = explorer.start(self.bank.classes[0])
            self.history = gradio.State([(first, None)])  # of each `Mixture`, the last is shown
            self.kept = gradio.State([])
            gradio.HTML(widgets.heading(explorer))
            with gradio.Row(elem_id="page"):
                with gradio.Column(scale=4, min_width=320):
                    self._add_controls()
                with gradio.Column(scale=7, min_width=480):
                    with gradio.Tab("Mix"):
                        self._add_images()
                    with gradio.Tab("Walk"):
                        self._add_walk()
            self._wire()

    def _add_controls(self) -> None:
        """Add the left side: class, members, weights, draw, sampling."""
        gr, usual = self.gr, self.explorer.sampling(self.explorer.quick)
        classes = list(self.named)
        with gr.Row():
            self.classes = gr.Dropdown(classes, value=classes[0], label="Class", min_width=140)
            self.of = gr.Dropdown(classes, value=classes[0], label="Images of", min_width=140)
        self.grid = gr.HTML(js_on_load=widgets.asset("grid.js"))
        self.mixer = gr.HTML(js_on_load=widgets.asset("mixer.js"), elem_id="mixer")
        with gr.Row(equal_height=True):
            self.alpha = gr.Slider(0.05, 5, 1, step=0.05, label="Dirichlet α", min_width=150)
            self.seed = gr.Number(0, label="Seed", minimum=0, precision=0, min_width=80)
        with gr.Row():
            self.draw = gr.Button("Draw members and weights", size="md", scale=3, min_width=190)
            self.undo = gr.Button("Undo", size="md", scale=1, min_width=80)
        self.prompt = gr.Textbox(label="Prompt", placeholder="the bank's", max_lines=3)
        with gr.Accordion("Sampling", open=False):
            self.noise = gr.Slider(0, 0.95, 0, step=0.05, label="Share of fresh noise")
            names, first = [*PROFILES, *SOLVERS], self.explorer.quick
            self.solver = gr.Dropdown(names, value=first, label="Solver")
            self.steps = gr.Slider(1, 100, usual.steps, step=1, label="Steps")
            guided = self.explorer.guided
            self.guidance = gr.Slider(
                1, 15, usual.guidance, step=0.5, label="Guidance", interactive=guided
            )

    def _add_images(self) -> None:
        """Add the right side: two rules beside each other, and what was kept."""
        gr = self.gr
        names = [f"{norm}/{mean}" for mean in MEANS for norm in NORMS]
        self.sides = []
        with gr.Row():
            for letter, rule, label in (("a", "fade/chm", "Rule"), ("b", "fix/0", "Another rule")):
                with gr.Column(min_width=220):
                    rules = gr.Dropdown(names, value=rule, label=label, allow_custom_value=True)
                    image = gr.HTML(elem_id=f"image-{letter}", elem_classes="centroid")
                    keep = gr.Button("Keep", elem_id=f"keep-{letter}", size="sm")
                    with gr.Accordion("Make it again", open=False, elem_id=f"again-{letter}"):
                        python = gr.Code(language="python", label="Python", elem_id=f"py-{letter}")
                        shell = gr.Code(language="shell", label="Command", elem_id=f"sh-{letter}")
                self.sides.append((rules, image, keep, python, shell))
        self.tray = gr.HTML(elem_id="tray")
        out = self.explorer.out
        label = widgets.shown(f"Export to {out}") if out else "Export: start with --out DIR"
        with gr.Row(visible=False) as self.tray_buttons:
            self.empty = gr.Button("Empty", size="sm", scale=1)
            self.export = gr.Button(label, size="sm", scale=3, interactive=out is not None)

    def _add_walk(self) -> None:
        """Add two images, and the walk between them."""
        gr, self.ends = self.gr, []
        names = (list(self.named) * 2)[:2]
        with gr.Row():
            for number, (label, name) in enumerate(zip(("From", "To"), names, strict=True)):
                with gr.Column(min_width=200):
                    ids = list(self.ids_of(name))
                    kind = gr.Dropdown(list(self.named), value=name, label=label)
                    image = gr.Dropdown(ids, value=ids[min(number, len(ids) - 1)], label="Image")
                self.ends += [kind, image]
        with gr.Row():
            self.way = gr.Dropdown(list(WALKS), value="slerp", label="Walk")
            self.frames = gr.Slider(3, 33, 9, step=2, label="Frames")
        self.go = gr.Button("Walk", variant="primary")
        self.player = gr.HTML(js_on_load=widgets.asset("player.js"))

    def _wire(self) -> None:
        """Connect the controls with what they change."""
        rules = [side[0] for side in self.sides]
        self.how = [self.solver, self.steps, self.guidance, self.prompt]
        self.given = [self.history, *rules, *self.how]
        self._on(self.blocks.load, self.same)
        self._on(self.grid.pick, self.picked, mode="multiple")  # no click is lost
        self._on(self.mixer.mix, self.mixed, fresh=False)
        self._on(self.classes.input, self.of_class, self.classes)
        self.of.input(self.images_to_pick, [self.history, self.of], self.grid, **QUIET)
        self._on(self.undo.click, None, mode="multiple")
        self._on(self.alpha.input, self.drawn, self.alpha)
        self._on(self.draw.click, self.drawn_again, self.alpha, mode="once")
        self._on(self.seed.input, self.seeded, self.seed)
        self._on(self.noise.input, self.noisy, self.noise, fresh=False)
        for control in (*rules, self.steps, self.guidance):
            self._on(control.input, self.same, fresh=False)
        for leave in (self.prompt.submit, self.prompt.blur):
            self._on(leave, self.same, fresh=False)
        chosen = self.solver.input(
            lambda name: self.explorer.sampling(name).steps, self.solver, self.steps, **QUIET
        )
        self._on(chosen.then, self.same, fresh=False, mode="multiple")
        tray = [self.kept, self.tray, self.tray_buttons]
        for rule, _, keep, *_ in self.sides:
            keep.click(self.keep, [self.kept, self.history, rule, *self.how], tray, **QUIET)
        self.empty.click(lambda: self.show_tray([]), None, tray, **QUIET)
        self.export.click(self.exported, self.kept, tray, **QUIET)
        for kind, image in (self.ends[:2], self.ends[2:]):
            kind.input(self.images_of, kind, image, **QUIET)
        inputs = [*self.ends, self.way, self.frames, *self.how[:3]]
        self.go.click(self.walk, inputs, self.player, **{**QUIET, "show_progress": "full"})

    def _on(
        self,
        event: Callable[..., Any],
        edit: Callable[..., Mixture] | None,
        control: Any = None,
        fresh: bool = True,
        mode: str = "always_last",
    ) -> None:
        """Let an event change the mixture, by the value of a control or the data of the event."""

        def listener(event: self.gr.EventData, history: Any, *rest: Any) -> Iterator[list[Any]]:  # type: ignore
            *how, value = rest if control else (*rest, event._data)
            label = value.get("label") if isinstance(value, dict) else None
            done = None if edit is None else lambda *old, edit=edit: edit(*old, value)
            yield from self.change(done, history, how, fresh, label)

        shown = [self.history, self.classes, self.noise, self.seed, self.of, self.grid, self.mixer]
        shown += [part for _, image, _, *code in self.sides for part in (image, *code)]
        event(
            listener, [*self.given, *([control] if control else [])], shown, trigger_mode=mode,
            concurrency_id="mixture", **QUIET,  # one after the other: the last move is shown last
        )  # fmt: skip

    def change(
        self,
        edit: Callable[..., Mixture] | None,
        history: list[Mixture],
        how: Any,
        fresh: bool = True,
        label: int | None = None,
    ) -> Iterator[list[Any]]:
        """Change the mixture, and show what comes of it, piece by piece.

        Args:
            edit: maps a plan and its alpha to the new ones; None takes the last change back.
            history: the mixtures until now.
            how: both rules, solver, steps, guidance, prompt.
            fresh: whether grid and sliders are to be drawn again.
            label: the class whose images are shown to choose from; by default the plan's.
        """
        skip, (*rules, solver, steps, guidance, prompt) = self.gr.skip(), how
        try:
            if edit is None:
                history = history[:-1] or history
            else:
                history = remembered(history, edit(*history[-1]))
            plan, alpha = history[-1]
            pieces = [skip] * 6
            if edit is None:
                pieces[:3] = widgets.shown(plan.class_name), plan.noise, plan.seed
            if fresh:
                name = plan.class_name if label is None else self.bank.classes[label]
                pieces[3:] = (
                    widgets.shown(name),
                    widgets.grid(self.explorer, plan, name),
                    widgets.mixer(self.explorer, plan),
                )
            yield [history, *pieces, *[skip] * 6]
            for side, rule in enumerate(rules):
                choice = self.choice((plan, alpha), rule, solver, steps, guidance, prompt)
                yield [*[skip] * (7 + 3 * side), *self.side(choice), *[skip] * (3 - 3 * side)]
        except UserError as error:
            raise self.error(error) from None

    def error(self, error: UserError) -> Exception:
        """Return an error as gradio shows it."""
        return self.gr.Error(widgets.shown(str(error)), print_exception=False)

    def choice(self, mixture: Mixture, rule: str, *how: float | str) -> Choice:
        """Return the choice of a mixture, a rule, and solver, steps, guidance and prompt."""
        solver, steps, guidance, prompt = how
        sampling = self.explorer.sampling(str(solver), int(steps), float(guidance))
        return Choice(mixture[0], rule, sampling, mixture[1], str(prompt or "").strip())

    def side(self, choice: Choice) -> list[str]:
        """Return an image, and the lines to make it again."""
        return [
            widgets.centroid(self.explorer, choice),
            widgets.shown(self.explorer.python(choice)),
            widgets.shown(self.explorer.command(choice) or BY_HAND),
        ]

    def of_class(self, plan: Plan, _: float | None, name: str) -> Mixture:
        """Take the first images of another class."""
        first = self.explorer.start(self.named[name], len(plan.members))
        return replace(first, noise=plan.noise, seed=plan.seed), None

    def same(self, plan: Plan, alpha: float | None, _: object) -> Mixture:
        """Leave the mixture as it is."""
        return plan, alpha

    def picked(self, plan: Plan, _: float | None, data: dict[str, int]) -> Mixture:
        """Add an image, or leave it out."""
        name = self.bank.classes[data["label"]]
        return toggled(plan, self.bank.members[name][data["row"]], name), None

    def images_to_pick(self, history: list[Mixture], name: str) -> str:
        """Return the images of a class, to choose members from."""
        return widgets.grid(self.explorer, history[-1][0], self.named[name])

    def mixed(self, plan: Plan, alpha: float | None, data: dict[str, list[float]]) -> Mixture:
        """Set other weights, unless they are of members that were exchanged meanwhile."""
        if len(data["weights"]) != len(plan.members):
            return plan, alpha
        return reweighted(plan, data["weights"]), None

    def drawn(
        self, plan: Plan, old: float | None, alpha: float, following: bool = False
    ) -> Mixture:
        """Repeat the draw with another α; the first draw after weights were set by hand."""
        again = 0 if old is None else plan.index // len(self.bank.classes) + following
        return self.explorer.draw(plan, alpha, again), alpha

    def drawn_again(self, plan: Plan, old: float | None, alpha: float) -> Mixture:
        """Make the first draw, or the next."""
        return self.drawn(plan, old, alpha, following=True)

    def seeded(self, plan: Plan, alpha: float | None, seed: int | None) -> Mixture:
        """Draw with another seed; of a mixture by hand, the noise only."""
        plan = replace(plan, seed=int(seed or 0))
        return (plan, None) if alpha is None else self.drawn(plan, alpha, alpha)

    def noisy(self, plan: Plan, alpha: float | None, noise: float) -> Mixture:
        """Take another share of noise."""
        return replace(plan, noise=float(noise)), alpha

    def keep(
        self, kept: list[Choice], history: list[Mixture], rule: str, *how: float | str
    ) -> list[Any]:
        """Put an image into the tray, if it is not there."""
        choice = self.choice(history[-1], rule, *how)
        return self.show_tray([*kept, *([] if choice in kept else [choice])])

    def show_tray(self, kept: Sequence[Choice]) -> list[Any]:
        """Return what is kept, its picture, and whether its buttons are visible."""
        return [list(kept), widgets.tray(self.explorer, kept), self.gr.Row(visible=bool(kept))]

    def exported(self, kept: list[Choice]) -> list[Any]:
        """Write what is kept, and empty the tray."""
        try:
            path = export(self.explorer, kept)
        except UserError as error:
            raise self.error(error) from None
        self.gr.Info(widgets.shown(f"{len(kept)} images written to {path}"))
        return self.show_tray([])

    def images_of(self, name: str) -> Any:
        """Return the images of a class to choose from."""
        ids = list(self.ids_of(name))
        return self.gr.Dropdown(ids, value=ids[0])

    def ids_of(self, name: str) -> dict[str, str]:
        """Return the images of a class, by their names as they are shown."""
        return {widgets.shown(i): i for i in self.bank.members[self.named[name]]}

    def walk(
        self, home: str, first: str, away: str, last: str, name: str, count: int, *how: float | str
    ) -> str:
        """Return a walk, ready to be played."""
        solver, steps, guidance = how
        ends = [(self.named[n], self.ids_of(n).get(i, i)) for n, i in ((home, first), (away, last))]
        try:
            sampling = self.explorer.sampling(str(solver), int(steps), float(guidance))
            images, norms = self.explorer.walk(ends, name, int(count), sampling)
        except UserError as error:
            raise self.error(error) from None
        return widgets.player(images, norms)
