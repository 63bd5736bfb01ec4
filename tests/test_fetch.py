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


def test_it_lands_below_the_storage_root_and_names_the_key(tmp_path, monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(fetch, "_download", lambda name, folder: seen.update(name=name, folder=folder) or str(folder))
    assert fetch.main(["openvla/openvla-7b", "--root", str(tmp_path)]) == 0
    assert seen == {"name": "openvla/openvla-7b", "folder": tmp_path / "hf_cache" / "openvla" / "openvla-7b"}
    assert "--backbone.checkpoint openvla/openvla-7b" in capsys.readouterr().out
    with pytest.raises(ValueError, match="openvla/openvla-7b"):
        fetch.main([])


def test_a_full_disk_is_not_a_network():
    work, calls = failing(99, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space"):
        fetch.with_retries(work, sleep=lambda seconds: None)
    assert len(calls) == 1
