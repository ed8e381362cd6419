#!/usr/bin/env bash
# The first hour of a stranger: odd photographs in an empty folder, the installed package alone.
#
# usage: first_hour.sh SITE PAGE...   in an empty folder; SITE holds an unpacked wheel, whose
# dependencies $PYTHON has. Runs every bash and python block of the pages, which are Markdown.
set -euo pipefail
site=$1
shift
: "${PYTHON:=python3}"
export PYTHONPATH=$site PYTHONSAFEPATH=1 PATH=$site/bin:$PATH

# Packages of the user's own, with the names of ours, in the folder that everything runs in.
for name in augment training configs; do
	mkdir "$name"
	echo 'raise SystemExit("a package of the current folder was imported")' >"$name/__init__.py"
done

"$PYTHON" - <<'EOF'
import io
from pathlib import Path

import numpy as np
from PIL import Image

rng = np.random.default_rng(0)


def photograph(width, height):
    """A lit ball before a gradient, in colour, with some grain."""
    y, x = np.mgrid[0:1:height * 1j, 0:1:width * 1j][..., None]
    centre, colour, sky = rng.uniform(0.3, 0.7, 2), rng.uniform(0, 1, 3), rng.uniform(0, 1, 3)
    ball = np.exp(-(((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / 0.05) ** 2)
    picture = (1 - ball) * (sky * (0.4 + 0.6 * y)) + ball * colour * (1.2 - x)
    grain = rng.normal(0, 0.02, picture.shape)
    return Image.fromarray((255 * (picture + grain).clip(0, 1)).astype(np.uint8))


def write(folder):
    """Eight photographs, none like another."""
    folder.mkdir(parents=True)
    photograph(640, 427).save(folder / "Urlaub am Meer (1).jpg", quality=90)
    photograph(300, 400).convert("RGBA").save(folder / "Größe äöü.png")
    photograph(200, 150).convert("CMYK").save(folder / "print.JPG", "JPEG")
    grey = np.asarray(photograph(120, 90).convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(folder / "scan 16 bit.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    photograph(400, 300).save(folder / "IMG_0001.jpeg", exif=exif)
    photograph(9, 7).save(folder / "icon.png")
    photograph(2600, 1900).save(folder / "panorama.webp")
    photograph(150, 150).quantize(64).save(folder / "old.gif")


for name in ("Sandal", "alter Hut", "Grüne Bäume"):
    write(Path("photos") / name)
    photograph(500, 333).save(Path("photos") / name / "last.jpg")
    test = Path("photos-test") / name
    test.mkdir(parents=True)
    photograph(200, 300).save(test / "a.jpg")
    photograph(300, 200).save(test / "b.png")
whole = io.BytesIO()
photograph(320, 240).save(whole, "JPEG")
Path("photos/Sandal/broken.jpg").write_bytes(whole.getvalue()[:2000])
EOF

where=$("$PYTHON" -c 'import augment.training; print(augment.training.__file__)')
[[ $where == "$site"/* ]] || { echo "expected augment of $site, got $where" >&2; exit 1; }
latent-augment --help >/dev/null
latent-augment train fit --config few_shot_dafusion --print-config | grep -q 'shots: 4'
"$PYTHON" -c 'import ray' 2>/dev/null &&
	latent-augment --quiet invert photos --bank ray/bank --executor ray --errors false --steps 2

"$PYTHON" - "$@" <<'EOF'
import re
import subprocess
import sys
from pathlib import Path

for page in sys.argv[1:]:
    for kind, text in re.findall(r"^```(bash|python)\n(.*?)^```", Path(page).read_text(), re.M | re.S):
        command = ["bash", "-euc", text] if kind == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        sys.stderr.write(done.stderr)
        if done.returncode or "Traceback" in done.stderr:
            sys.exit(f"{page}: this ended with {done.returncode}:\n{text}")
EOF
echo "the first hour is over"
