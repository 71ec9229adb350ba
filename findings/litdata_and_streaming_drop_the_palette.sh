#!/usr/bin/env bash
# litdata 0.2.76 and mosaicml-streaming 0.13.0 (encoding "pil") store an image of mode P without its palette: it is read
# back black, silently.
#
# A PNG or GIF of few colours, as charts, diagrams and screenshots often are, opens as mode P: one byte per pixel, the
# number of a colour in the image's palette. Both writers keep size, mode and bytes, and the readers build the image from
# these by `Image.frombytes`, which leaves the palette empty. Size and mode are right, and `convert("RGB")`, which every
# image processor does first, gives black for every pixel. Converting before writing keeps the colours.
#
# Seen with Pillow 13.0.0, a PNG whose upper half is red and whose lower half is white (its first and last pixel):
#   the file: P, [(255, 0, 0), (255, 255, 255)]
#   litdata: P, [(0, 0, 0), (0, 0, 0)]
#   litdata, converted before: RGB, [(255, 0, 0), (255, 255, 255)]
#   streaming, pil: P, [(0, 0, 0), (0, 0, 0)]
#   streaming, png: P, [(255, 0, 0), (255, 255, 255)]
#
# Fails when the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0 torch==2.13.0 lightning-utilities boto3 \
    requests tifffile obstore
# litdata's torchvision decodes JPEGs and streaming's dependencies fetch from clouds: neither is needed here.
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps litdata==0.2.76 mosaicml-streaming==0.13.0
cat >"$folder/colours.py" <<'PYTHON'
import importlib.util
import pathlib
import sys

import litdata
from PIL import Image

folder = pathlib.Path(sys.argv[1])
file = folder / "chart.png"


def sample(converted: bool) -> dict:
    image = Image.open(file)
    return {"image": image.convert("RGB") if converted else image}


def told(image: Image.Image) -> str:
    colours = image.convert("RGB")
    return f"{image.mode}, {[colours.getpixel(place) for place in ((0, 0), (31, 31))]}"


if __name__ == "__main__":
    image = Image.new("RGB", (32, 32), "white")
    image.paste("red", (0, 0, 32, 16))
    image.quantize(2).save(file)
    seen = [f"the file: {told(Image.open(file))}"]
    for converted, name in ((False, "litdata"), (True, "litdata, converted before")):
        written = str(folder / f"written-{converted}")
        litdata.optimize(sample, inputs=[converted], output_dir=written, chunk_bytes="10MB", num_workers=1)
        seen.append(f"{name}: {told(litdata.StreamingDataset(written)[0]['image'])}")
    # The module alone: the package imports the clients of every cloud.
    package = pathlib.Path(importlib.util.find_spec("streaming").origin).parent
    spec = importlib.util.spec_from_file_location("encodings_of_mds", package / "base/format/mds/encodings.py")
    encodings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(encodings)
    for kind in ("pil", "png"):
        stored = encodings.mds_encode(kind, Image.open(file))
        seen.append(f"streaming, {kind}: {told(encodings.mds_decode(kind, stored))}")
    print(*seen, sep="\n")
    assert seen == [
        "the file: P, [(255, 0, 0), (255, 255, 255)]",
        "litdata: P, [(0, 0, 0), (0, 0, 0)]",
        "litdata, converted before: RGB, [(255, 0, 0), (255, 255, 255)]",
        "streaming, pil: P, [(0, 0, 0), (0, 0, 0)]",
        "streaming, png: P, [(255, 0, 0), (255, 255, 255)]",
    ]
PYTHON
"$folder/venv/bin/python" "$folder/colours.py" "$folder"
