"""The recordings are what the original gave: nobody adjusts them to make a test pass."""

import hashlib

from tests.parity.golden import FIXTURES, load_json


def test_every_recording_is_as_it_was_made():
    listed = load_json("MANIFEST.json")["files"]
    found = {str(path.relative_to(FIXTURES)) for path in FIXTURES.rglob("*") if path.is_file()} - {"MANIFEST.json"}
    assert found == set(listed)
    for name, expected in listed.items():
        assert hashlib.sha256((FIXTURES / name).read_bytes()).hexdigest() == expected["sha256"], name
