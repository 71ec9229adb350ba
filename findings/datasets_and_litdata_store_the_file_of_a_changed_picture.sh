#!/usr/bin/env bash
# datasets 5.2.0 and litdata 0.2.76 store the file that a Pillow picture came from, not the picture, even where it was changed.
#
# A picture opened from a JPEG file keeps its class and its `filename` when it is changed in place: `paste` (say, over a
# face or a caption that shall not be learned), `thumbnail`, `putpixel`. Both writers look at `filename` and take the
# file's bytes. So the dataset has the picture as it was, in full size, and nothing is said. Of a copy, as `resize`,
# `convert` and `copy` return one, the changed pixels are stored.
#
# Seen with datasets 5.2.0, litdata 0.2.76, Pillow 13.0.0, Python 3.11: a light JPEG of 640 x 480, made black by `paste`,
# then 64 x 48 by `thumbnail`:
#   changed in place: 64 x 48, mean 0
#   datasets: 640 x 480, mean 200
#   datasets, a copy of it: 64 x 48, mean 0
#   litdata: the file's bytes, as they were, are in the chunk True
#   litdata, a copy of it: they are in the chunk False
#
# Fails when the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# litdata's torchvision decodes pictures; this only writes.
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pillow==13.0.0 torch==2.13.0 \
    lightning-utilities boto3 requests tifffile obstore
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps litdata==0.2.76
cat >"$folder/write.py" <<'PYTHON'
import pathlib
import sys

import litdata
import numpy
from datasets import Dataset
from PIL import Image

folder = pathlib.Path(sys.argv[1])
file = folder / "picture.jpg"


def changed(copied: bool) -> Image.Image:
    picture = Image.open(file)
    picture.paste((0, 0, 0), (0, 0, *picture.size))
    picture.thumbnail((64, 64))
    return picture.copy() if copied else picture


def sample(copied: bool) -> dict:
    return {"picture": changed(copied)}


def told(picture: Image.Image) -> str:
    return f"{picture.width} x {picture.height}, mean {numpy.asarray(picture).mean():.0f}"


if __name__ == "__main__":
    Image.fromarray(numpy.full((480, 640, 3), 200, dtype=numpy.uint8)).save(file)
    seen = [f"changed in place: {told(changed(False))}"]
    for copied, name in ((False, "datasets"), (True, "datasets, a copy of it")):
        seen.append(f"{name}: {told(Dataset.from_dict({'picture': [changed(copied)]})[0]['picture'])}")
    for copied, name in ((False, "litdata: the file's bytes, as they were,"), (True, "litdata, a copy of it: they")):
        written = folder / f"written-{copied}"
        litdata.optimize(sample, inputs=[copied], output_dir=str(written), chunk_bytes="10MB", num_workers=1)
        stored = b"".join(chunk.read_bytes() for chunk in sorted(written.glob("chunk-*.bin")))
        seen.append(f"{name} are in the chunk {file.read_bytes() in stored}")
    print(*seen, sep="\n")
    assert seen == [
        "changed in place: 64 x 48, mean 0",
        "datasets: 640 x 480, mean 200",
        "datasets, a copy of it: 64 x 48, mean 0",
        "litdata: the file's bytes, as they were, are in the chunk True",
        "litdata, a copy of it: they are in the chunk False",
    ]
PYTHON
"$folder/venv/bin/python" "$folder/write.py" "$folder"
