#!/usr/bin/env bash
# Pillow 13.0.0 scrambles an uncompressed TIFF with EXIF orientation 5 to 8 when it is opened by its file name.
#
# Opened by name, an uncompressed TIFF of mode L, P, RGBA, CMYK or I;16 is mapped into memory. Pillow turns TIFFs upright
# when it loads them, and for the four orientations that exchange width and height the mapped bytes are read with rows of
# the wrong length. The same file, opened as a stream, is right, and so is the same picture compressed by LZW.
#
# Seen with Pillow 13.0.0, a 6 x 4 picture of mode L whose values count up:
#   orientation 1: by name equal to as a stream True
#   orientation 6: by name equal to as a stream False
#
# Fails when the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import pathlib
import sys

from PIL import Image

folder = pathlib.Path(sys.argv[1])
picture = Image.frombytes("L", (6, 4), bytes(range(24)))
equal = {}
for orientation in (1, 6):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = folder / f"{orientation}.tif"
    picture.save(file, exif=exif)
    with Image.open(file) as image:
        by_name = (image.load(), image.size, image.tobytes())[1:]
    with open(file, "rb") as stream, Image.open(stream) as image:
        as_stream = (image.load(), image.size, image.tobytes())[1:]
    equal[orientation] = by_name == as_stream
    print(f"orientation {orientation}: by name equal to as a stream {equal[orientation]}")
assert equal == {1: True, 6: False}
PYTHON
