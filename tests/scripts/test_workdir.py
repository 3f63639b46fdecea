"""The files in the folder of a run survive a crash at any moment, the power cut included."""

import json

import pytest
import workdir

from tests.support.disk import check_every_crash


@pytest.mark.parametrize("old", [None, "the old text\n"])
def test_a_file_is_the_old_or_the_new(tmp_path, old):
    root, new = tmp_path / "root", "the new text, which is longer\n"
    root.mkdir()
    if old is not None:
        (root / "a.json").write_text(old)

    def read(folder):
        return (folder / "a.json").read_text() if (folder / "a.json").exists() else None

    check_every_crash(root, tmp_path / "s", lambda: workdir.write_atomically(root / "a.json", new), read, old, new)


def test_a_folder_belongs_to_its_run_or_to_none(tmp_path):
    root, identity = tmp_path / "root", {"seed": 0}
    root.mkdir()

    def read(folder):
        path = folder / "runs" / "mine" / "config.json"
        return json.loads(path.read_text()) if path.exists() else None

    def claim():
        workdir.claim_workdir(root / "runs" / "mine", identity)

    check_every_crash(root, tmp_path / "s", claim, read, None, identity)
