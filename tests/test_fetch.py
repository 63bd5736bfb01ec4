"""Fetching a base model: the network is tried again, an answer that is final is not."""

import errno

import pytest

from vlakeep.core import fetch


def failing(times, error):
    calls = []

    def work():
        calls.append(1)
        if len(calls) <= times:
            raise error
        return "done"

    return work, calls


def test_a_network_that_fails_is_tried_again_with_longer_waits():
    work, calls = failing(3, TimeoutError("slow"))
    waits = []
    assert fetch.with_retries(work, sleep=waits.append) == "done" and len(calls) == 4 and waits == [5.0, 10.0, 20.0]


def test_it_gives_up_with_a_remedy():
    work, calls = failing(99, ConnectionError("no route"))
    with pytest.raises(ConnectionError, match="try 3 of 3.*HF_ENDPOINT"):
        fetch.with_retries(work, tries=3, sleep=lambda seconds: None)
    assert len(calls) == 3


@pytest.mark.parametrize("status, remedy", [(401, "huggingface-cli login"), (404, "check the name")])
def test_a_final_answer_is_not_asked_for_again(status, remedy):
    error = ConnectionResetError("no")
    error.response = type("Response", (), {"status_code": status})()
    work, calls = failing(99, error)
    with pytest.raises(ConnectionError, match=remedy):
        fetch.with_retries(work, sleep=lambda seconds: None)
    assert len(calls) == 1


class Hub:
    """Stands for the hub: repositories of small files, some of which do not come at first."""

    def __init__(self, monkeypatch, files, late=()):
        self.files, self.late, self.asked, self.fetched = files, list(late), 0, []
        monkeypatch.setattr(fetch, "_listing", self.listing)
        monkeypatch.setattr(fetch, "_download", self.download)
        monkeypatch.setattr(fetch.time, "sleep", lambda seconds: None)
        monkeypatch.setattr(fetch.with_retries, "__defaults__", (fetch.TRIES, 0.0, lambda seconds: None))

    def listing(self, kind, name):
        self.asked += 1
        return "c0ffee", {path: len(text) for path, text in self.files.items()}

    def download(self, wanted, commit):
        self.fetched.append((wanted.kind, wanted.name, wanted.folder, wanted.cache, commit))
        for path, text in self.files.items():
            if any(fetch.fnmatch(path, pattern) for pattern in wanted.patterns):
                (wanted.folder / path).parent.mkdir(parents=True, exist_ok=True)
                (wanted.folder / path).write_text(text[:-1] if path in self.late else text)
        if self.late:
            self.late.pop()


def test_it_lands_below_the_storage_root_and_names_the_key(tmp_path, monkeypatch, capsys):
    hub = Hub(monkeypatch, {"config.json": "{}", "model.safetensors": "weights", "model.bin": "pickled"})
    assert fetch.main(["openvla/openvla-7b", "--root", str(tmp_path)]) == 0
    folder = tmp_path / "hf_cache" / "openvla" / "openvla-7b"
    assert hub.fetched == [("model", "openvla/openvla-7b", folder, tmp_path / "hf_cache", "c0ffee")]
    assert "--backbone.checkpoint openvla/openvla-7b" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    for words in ([], ["a"], ["a/b", "--dataset", "c/d"], ["--dataset", "d"], ["a/b", "--only", "c"]):
        with pytest.raises(ValueError, match="openvla/openvla-7b|--only takes"):
            fetch.main([*words, "--root", str(tmp_path)])


RLDS = {"README.md": "all", "libero_goal/1.0.0/a.tfrecord": "goal",
        "libero_ten/1.0.0/a.tfrecord": "ten!", "libero_ten/1.0.0/b.tfrecord": "b"}


def test_a_data_set_is_fetched_once_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    # Both times that the first file comes short the library says nothing, as without a network it takes a folder that is there.
    hub = Hub(monkeypatch, RLDS, ["libero_ten/1.0.0/a.tfrecord"] * 2)
    command = ["--dataset", "openvla/modified", "--only", "libero_ten, libero_goal", "--root", str(tmp_path)]
    mark = tmp_path / "datasets" / ".fetched" / "openvla--modified--libero_ten.json"
    (tmp_path / "datasets" / "libero_ten" / "1.0.0").mkdir(parents=True)  # of a call that was stopped
    assert fetch.main(command) == 0 and len(hub.fetched) == 4 and "--data.datasets '[libero_ten, libero_goal]'" in capsys.readouterr().out
    assert mark.is_file() and not (tmp_path / "datasets" / "README.md").exists()
    assert (tmp_path / "datasets" / "libero_ten" / "1.0.0" / "a.tfrecord").read_text() == "ten!"
    assert fetch.main(command) == 0 and len(hub.fetched) == 4 and hub.asked == 4, "what is whole is not asked for"
    (tmp_path / "datasets" / "libero_ten" / "1.0.0" / "b.tfrecord").unlink()
    assert fetch.main(command) == 0 and len(hub.fetched) == 5, "a mark without its files is none"
    assert {(kind, cache) for kind, _, _, cache, _ in hub.fetched} == {("dataset", tmp_path / "hf_cache")}


def test_a_data_set_that_never_comes_whole_has_no_mark(tmp_path, monkeypatch):
    Hub(monkeypatch, RLDS, ["libero_ten/1.0.0/a.tfrecord"] * 99)
    with pytest.raises(ConnectionError, match="1 of 2 files of openvla/modified did not come whole, first libero_ten.*try 6 of 6"):
        fetch.main(["--dataset", "openvla/modified", "--only", "libero_ten", "--root", str(tmp_path)])
    assert not (tmp_path / "datasets" / ".fetched").exists()


def test_a_whole_data_set_has_a_folder_of_its_own_and_a_wrong_one_is_named(tmp_path, monkeypatch):
    Hub(monkeypatch, RLDS)
    assert fetch.main(["--dataset", "me/mine", "--root", str(tmp_path)]) == 0
    assert (tmp_path / "datasets" / "mine" / "README.md").read_text() == "all"
    with pytest.raises(ValueError, match=r"has no libero_two/\*; at its top are README.md, libero_goal, libero_ten"):
        fetch.main(["--dataset", "me/mine", "--only", "libero_two", "--root", str(tmp_path)])
    with pytest.raises(ValueError, match=r"--only \.\./x: must be a folder at the top"):
        fetch.main(["--dataset", "me/mine", "--only", "../x", "--root", str(tmp_path)])


def test_the_hub_is_given_the_cache_and_the_commit(tmp_path, monkeypatch):
    import huggingface_hub

    seen = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kwargs: seen.update(kwargs, name=name))
    wanted = fetch.Wanted("dataset", "a/b", tmp_path / "d", ["x/*"], tmp_path / "hf_cache", tmp_path / "mark")
    fetch._download(wanted, "c0ffee")
    assert seen == {"name": "a/b", "repo_type": "dataset", "revision": "c0ffee", "local_dir": str(tmp_path / "d"),
                    "cache_dir": str(tmp_path / "hf_cache" / "hub"), "allow_patterns": ["x/*"]}


def test_a_full_disk_is_not_a_network():
    work, calls = failing(99, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space"):
        fetch.with_retries(work, sleep=lambda seconds: None)
    assert len(calls) == 1
