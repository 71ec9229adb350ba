"""Write the samples beside this file with the packages whose forms they are: `python make.py FORM` in each one's own
environment, see README.md.
"""

import functools
import http.server
import io
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent


def picture(number: int, kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (40, 30), (20 * number, 80, 160)).save(content, kind)
    return content.getvalue()


def chat(number: int) -> list[dict]:
    return [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"Ball {number}."}]


def write_datasets() -> None:
    """FineVision's, the_cauldron's, LLaVA-OneVision's and PixMo-Points' rows, as directory and as Parquet."""
    from datasets import Dataset, Features, Image, Sequence, Value

    texts = [{"user": Value("string"), "assistant": Value("string")}]
    ratings = ("relevance", "visual_dependency", "image_correspondence", "formatting")
    columns = {"images": Sequence(Image()), "texts": texts, "source": Value("string")}
    for name in ratings:
        columns |= {f"{name}_ratings": Sequence(Value("int64")), f"{name}_min": Value("int64")}
    rows = []
    for number, values in enumerate([[5, 2], [4, 5], [1, 1]]):
        row = {"images": [{"bytes": picture(number)}], "source": "sample"}
        row["texts"] = [{"user": "What?", "assistant": f"Ball {number}."}, {"user": "Sure?", "assistant": "Yes."}]
        for name in ratings:
            row |= {f"{name}_ratings": values if name == "relevance" else [5, 5], f"{name}_min": min(values)}
        rows.append(row)
    Dataset.from_list(rows, Features(columns)).save_to_disk(HERE / "datasets" / "finevision")

    texts = [{"user": Value("string"), "assistant": Value("string"), "source": Value("string")}]
    rows = [
        {
            "images": [{"bytes": picture(number)}] * (number + 1),
            "texts": [dict(user="What?", assistant="A ball.", source="s")],
        }
        for number in range(2)
    ]
    features = Features({"images": Sequence(Image()), "texts": texts})
    Dataset.from_list(rows, features).to_parquet(HERE / "datasets" / "cauldron.parquet")

    turns = [{"from": Value("string"), "value": Value("string")}]
    names = {"id": Value("string"), "image": Image(), "conversations": turns, "data_source": Value("string")}
    rows = [
        {"id": "a.png", "image": {"bytes": picture(0)}, "conversations": chat(0), "data_source": "s"},
        {"id": "b", "image": None, "conversations": chat(1)[1:], "data_source": "s"},
    ]
    rows[1]["conversations"] = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    Dataset.from_list(rows, Features(names)).to_parquet(HERE / "datasets" / "onevision.parquet")

    points = [{"x": Value("float64"), "y": Value("float64")}]
    names = {"image_url": Value("string"), "image_sha256": Value("string"), "points": points, "count": Value("int64")}
    names |= {"label": Value("string"), "collection_method": Value("string")}
    rows = [dict(image_url="https://images.invalid/a.png", image_sha256="0", collection_method="pointing")]
    rows[0] |= {"points": [{"x": 10.5, "y": 20.25}], "count": 1, "label": "ball"}
    Dataset.from_list(rows, Features(names)).to_parquet(HERE / "datasets" / "pixmo_points.parquet")


def write_energon() -> None:
    """Shards as Megatron's script for LLaVA's data writes them (the conversation is the json), prepared by energon."""
    import webdataset

    folder = HERE / "energon"
    folder.mkdir()
    with webdataset.ShardWriter(f"{folder}/shard_%04d.tar", maxcount=2, encoder=False) as shards:
        for number in range(4):
            sample = {"jpg": picture(number, "JPEG"), "json": json.dumps(chat(number)).encode()}
            shards.write({"__key__": f"sample_{number:04d}", **sample})
    words = ["--non-interactive", "--split-ratio", "1,1,0", "--sample-type", "CrudeWebdataset"]
    subprocess.run([Path(sys.executable).with_name("energon"), "prepare", folder, *words], check=True)
    (folder / ".nv-meta" / "index.sqlite").unlink()  # larger than the shards, and not read


def write_mds() -> None:
    """A JPEG and a list of turns a sample, plain and compressed; several images and a caption."""
    from streaming import MDSWriter

    opened = lambda number, kind: Image.open(io.BytesIO(picture(number, kind)))  # noqa: E731
    for folder, compression in (("train", None), ("packed", "zstd")):
        columns = {"id": "str", "image": "jpeg", "conversations": "json"}
        with MDSWriter(
            out=str(HERE / "mds" / folder), columns=columns, compression=compression, size_limit=2000
        ) as shards:
            for number in range(3):
                shards.write({"id": f"{number}", "image": opened(number, "JPEG"), "conversations": chat(number)})
    with MDSWriter(
        out=str(HERE / "mds" / "several"), columns={"images": "list[png]", "caption": "str", "n": "int"}
    ) as shards:
        shards.write({"images": [opened(0, "PNG"), opened(1, "PNG")], "caption": "two balls", "n": 2})


def litdata_jpeg(number: int) -> dict:
    opened = Image.open(io.BytesIO(picture(number, "JPEG")))
    return {"id": number, "image": opened, "conversations": json.dumps(chat(number))}


def litdata_bytes(number: int) -> dict:
    return {"id": number, "image": picture(number), "conversations": chat(number)}


def litdata_pixels(number: int) -> dict:
    return {"id": number, "image": Image.open(io.BytesIO(picture(number))), "caption": f"ball {number}"}


def write_litdata() -> None:
    import litdata

    for fields in (litdata_jpeg, litdata_bytes, litdata_pixels):
        folder = HERE / "litdata" / fields.__name__.partition("_")[2]
        litdata.optimize(fn=fields, inputs=[0, 1, 2], output_dir=str(folder), num_workers=1, chunk_size=2)


def write_img2dataset() -> None:
    """PixMo-Points' rows whose pictures were fetched, from a server of this file's own; one is not there."""
    from datasets import Dataset

    served = HERE / "served"
    served.mkdir()
    for number in range(2):
        (served / f"{number}.jpg").write_bytes(picture(number, "JPEG"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=served)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 8765), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    points = [[{"x": 10.5, "y": 20.25}], [{"x": 90.0, "y": 5.0}, {"x": 3.0, "y": 7.06}], []]
    rows = [
        {
            "image_url": f"http://127.0.0.1:8765/{number}.jpg",
            "points": points[number],
            "label": "ball",
            "count": len(points[number]),
        }
        for number in range(3)
    ]
    table = served / "rows.parquet"
    Dataset.from_list(rows).to_parquet(table)
    words = (
        f"--url_list {table} --input_format parquet --url_col image_url --output_format webdataset --processes_count 1"
    )
    words += f" --output_folder {HERE / 'img2dataset'} --disable_all_reencoding True --thread_count 1"
    words = [*words.split(), "--save_additional_columns", '["points","label"]']
    subprocess.run([Path(sys.executable).with_name("img2dataset"), *words], check=True)
    server.shutdown()
    shutil.rmtree(served)


if __name__ == "__main__":
    shutil.rmtree(HERE / sys.argv[1], ignore_errors=True)
    globals()[f"write_{sys.argv[1]}"]()
