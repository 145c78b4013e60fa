"""Output is whole or not there."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import forks
import truedepth as td
from tiny_models import random_ids
from truedepth.checkpoint.writing import write_weights
from truedepth.files import atomic
from truedepth.files.atomic import atomic_directory
from truedepth.files.copying import BLOCK_BYTES
from truedepth.tensors import LazyTensor, from_tensor

PLAN = td.Plan(6, [[1, 2], [3, 4]])


def listing(directory):
    return sorted(entry.name for entry in directory.iterdir())


def test_contents(make_model, tmp_path):
    td.convert(make_model(), tmp_path / "out", PLAN)
    assert listing(tmp_path) == ["out"]
    assert set(listing(tmp_path / "out")) >= {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling.py",
        "stages.py",
        "wide_layers.py",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_widths"] == [1, 2, 2, 1]
    assert config["num_hidden_layers"] == 4
    assert config["truedepth"]["plan"]["groups"] == [[1, 2], [3, 4]]
    assert config["truedepth"]["version"] == td.__version__
    card = (tmp_path / "out" / "README.md").read_text()
    assert "0 [1+2] [3+4] 5" in card
    assert "| all-reduces per token under tensor parallelism | 12 | 8 |" in card


def test_shards_are_filled_to_their_size_and_load(make_model, tmp_path):
    td.convert(make_model(), tmp_path / "one", PLAN)
    td.convert(make_model(), tmp_path / "many", PLAN, shard_size="100KB")
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 5
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    sizes = {}
    for shard in shards:
        tensors = load_file(shard)
        sizes[shard.name] = sum(t.nbytes for t in tensors.values())
        assert sizes[shard.name] <= 100_000 or len(tensors) == 1
        assert {n for n, s in index["weight_map"].items() if s == shard.name} == set(tensors)
    assert index["metadata"]["total_size"] == sum(sizes.values())
    one, many = (td.load(tmp_path / name).model for name in ("one", "many"))
    assert torch.equal(one(random_ids()).logits, many(random_ids()).logits)


def test_dtypes_of_every_width_are_aligned_and_read_back(tmp_path):
    tensors = {
        "a": torch.arange(3, dtype=torch.int8),
        "b": torch.randn(3, 5).to(torch.bfloat16),
        "c": torch.randn(4),
        "d": torch.randn(3, dtype=torch.float64),
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0, 3),
    }
    lazies = {name: from_tensor(tensor) for name, tensor in tensors.items()}
    write_weights(tmp_path, lazies)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)
    raw = (tmp_path / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    for name, tensor in tensors.items():
        assert (start + header[name]["data_offsets"][0]) % tensor.itemsize == 0


def test_tensors_are_written_in_small_blocks(tmp_path):
    asked = []

    def rows(start, stop):
        asked.append(stop - start)
        return torch.zeros(stop - start, 1 << 10)

    write_weights(tmp_path, {"a": LazyTensor((5000, 1 << 10), torch.float32, rows)})
    assert sum(asked) == 5000
    assert max(asked) * (1 << 12) <= BLOCK_BYTES


@pytest.mark.parametrize("size", ["5GB", "500 MiB", "100kb", 12345, "12345"])
def test_sizes_of_shards(tmp_path, size):
    write_weights(tmp_path, {"a": from_tensor(torch.zeros(3))}, size)


@pytest.mark.parametrize("size", ["huge", "-5GB", "0", 0, 1.5, "5XB", ""])
def test_sizes_that_are_none(tmp_path, size):
    with pytest.raises(td.TruedepthError, match="not a file size"):
        write_weights(tmp_path, {"a": from_tensor(torch.zeros(3))}, size)


def test_weights_in_another_dtype(make_model, tmp_path):
    td.convert(make_model(), tmp_path / "out", PLAN, dtype=torch.bfloat16)
    tensors = td.open_source(tmp_path / "out").tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16


def test_existing_output_needs_force(make_model, tmp_path):
    precious(tmp_path)
    with pytest.raises(td.TruedepthError, match="--force"):
        td.convert(make_model(), tmp_path / "out", PLAN)
    assert listing(tmp_path / "out") == ["precious"]
    td.convert(make_model(), tmp_path / "out", PLAN, force=True)
    assert "precious" not in listing(tmp_path / "out")
    assert listing(tmp_path) == ["out"]


def test_force_keeps_the_old_output_until_the_new_is_whole(make_model, tmp_path):
    precious(tmp_path)
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "out", force=True):
        raise RuntimeError
    assert listing(tmp_path) == ["out"]
    assert listing(tmp_path / "out") == ["precious"]


def cannot_swap_names(monkeypatch):
    """A C library without renameat2."""
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())


def precious(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")


def test_force_gives_the_old_output_back_if_the_rename_fails(tmp_path, monkeypatch):
    precious(tmp_path)
    rename = Path.rename

    def failing(self, target):
        if self.name == ".out.partial":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    cannot_swap_names(monkeypatch)
    failed = pytest.raises(td.TruedepthError, match="No space left")
    with failed, atomic_directory(tmp_path / "out", force=True):
        pass
    assert listing(tmp_path) == ["out"]
    assert listing(tmp_path / "out") == ["precious"]


@pytest.mark.parametrize("in_one_step", [True, False])
def test_force_where_the_file_system_can_swap_names_and_where_not(
    tmp_path, monkeypatch, in_one_step
):
    precious(tmp_path)
    if not in_one_step:
        cannot_swap_names(monkeypatch)
    else:
        monkeypatch.delattr(Path, "rename")
    with atomic_directory(tmp_path / "out", force=True) as partial:
        (partial / "new").touch()
    assert listing(tmp_path) == ["out"]
    assert listing(tmp_path / "out") == ["new"]


def test_what_a_run_killed_after_its_work_left_is_removed_by_the_next(make_model, tmp_path):
    """It was killed behind the rename: the output is whole, and the same command is refused."""
    precious(tmp_path)
    for name in (".out.partial", ".out.replaced", ".out.calibration", ".out.healing"):
        (tmp_path / name).mkdir()
    (tmp_path / ".out.calibration" / "used-up").touch()
    (tmp_path / ".out.healing" / "settings.json").touch()
    with pytest.raises(td.TruedepthError, match="--force"):
        td.convert(make_model(), tmp_path / "out", PLAN)
    assert listing(tmp_path) == [".out.healing", "out"]  # unfinished: there may be work in it


@pytest.mark.parametrize("removed", range(4))
def test_a_kill_while_what_is_used_up_is_removed(tmp_path, monkeypatch, removed):
    precious(tmp_path)
    kept = tmp_path / ".out.calibration"
    kept.mkdir()
    for name in ("used-up", "layer-0001.safetensors", "settings.json"):
        (kept / name).touch()
    unlink, times = Path.unlink, iter(range(removed))

    def killed(path, **options):
        if next(times, None) is None:
            raise KeyboardInterrupt
        unlink(path, **options)

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        atomic.discard(kept)
    assert kept.exists() == (removed < 3)
    with pytest.raises(td.TruedepthError, match="--force"):
        atomic.check_output(tmp_path / "out")
    assert listing(tmp_path) == ["out"]


def test_an_output_set_aside_by_a_killed_run_is_put_back(tmp_path):
    precious(tmp_path)
    (tmp_path / "out").rename(tmp_path / ".out.replaced")
    with pytest.raises(td.TruedepthError, match="--force"), atomic_directory(tmp_path / "out"):
        pass
    assert listing(tmp_path / "out") == ["precious"]


def test_an_output_that_appears_meanwhile_is_kept(tmp_path):
    with pytest.raises(td.TruedepthError, match="--force"), atomic_directory(tmp_path / "out"):
        precious(tmp_path)
    assert listing(tmp_path) == ["out"]
    assert listing(tmp_path / "out") == ["precious"]


@pytest.mark.parametrize("there", [True, False])
def test_an_output_that_is_a_link_is_written_where_it_points(make_model, tmp_path, there):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    if there:
        (tmp_path / "target").mkdir()
    td.convert(make_model(), tmp_path / "link", PLAN, force=there)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target" / "config.json").exists()
    assert listing(tmp_path) == ["link", "target"]


def test_a_source_of_links_is_not_overwritten(make_model, tmp_path):
    shutil.copytree(make_model(), tmp_path / "real")
    (tmp_path / "links").mkdir()
    for file in (tmp_path / "real").iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    with pytest.raises(td.TruedepthError, match="contains the source"):
        td.convert(tmp_path / "links", tmp_path / "real", PLAN, force=True)


def test_an_interrupted_run_leaves_nothing(tmp_path):
    def rows(start, stop):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "out") as partial:
        write_weights(partial, {"a": LazyTensor((4, 4), torch.float32, rows)})
    assert listing(tmp_path) == []


def test_a_second_run_on_the_same_output_is_refused(make_model, tmp_path):
    refused = pytest.raises(td.TruedepthError, match="another run")
    with atomic_directory(tmp_path / "out"), refused:
        td.convert(make_model(), tmp_path / "out", PLAN)
    assert listing(tmp_path) == ["out"]


def test_output_apart_from_the_source(make_model, tmp_path):
    source = make_model()
    for out in (source, source / "out", source / "a" / ".." / "out", source.parent):
        with pytest.raises(td.TruedepthError, match="source"):
            td.convert(source, out, PLAN, force=True)
    assert (source / "model.safetensors").exists()


@pytest.mark.parametrize("out", ["/proc/out", "/dev/null/out"])
def test_output_that_cannot_be_written(make_model, out):
    """As root no permission is denied, so places that nobody can write to."""
    with pytest.raises(td.TruedepthError, match="Cannot write to"):
        td.convert(make_model(), out, PLAN)


RUN_WITH_LIMIT = """
import resource, signal, sys, truedepth as td
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
td.convert(sys.argv[1], sys.argv[2], td.Plan(6, [[1, 2]]))
"""


def test_a_full_disk_leaves_nothing(make_model, tmp_path):
    """A limit on file size fails a write midway, as a full disk does."""
    done = forks.python(RUN_WITH_LIMIT, make_model(), tmp_path / "out")
    assert done.returncode == 1
    assert "File too large; nothing of it was kept" in done.stderr
    assert listing(tmp_path) == []


SLOW_RUN = """
import os, sys, time, truedepth as td
write = os.pwrite
def slowly(*where):
    print("writing", flush=True)
    time.sleep(0.05)
    return write(*where)
os.pwrite = slowly
td.convert(sys.argv[1], sys.argv[2], td.Plan(6, [[1, 2]]))
"""


def test_a_killed_run_leaves_no_output_and_the_next_run_cleans_up(make_model, tmp_path):
    with forks.begun(SLOW_RUN, make_model(), tmp_path / "out") as running:
        running.wait_for("writing")
        time.sleep(0.3)
        running.kill()
    assert listing(tmp_path) == [".out.partial"]
    td.convert(make_model(), tmp_path / "out", PLAN)
    assert listing(tmp_path) == ["out"]


def test_the_lock_goes_with_its_process(tmp_path):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    lock = os.open(partial, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(td.TruedepthError, match="another run"), atomic_directory(tmp_path / "out"):
        pass
    os.close(lock)
    with atomic_directory(tmp_path / "out"):
        pass
    assert listing(tmp_path) == ["out"]


def test_the_source_is_not_touched(make_model, tmp_path):
    source = make_model()
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in source.iterdir()}
    td.convert(source, tmp_path / "out", PLAN)
    assert before == {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in source.iterdir()}


def test_a_plan_of_another_depth(make_model, tmp_path):
    with pytest.raises(td.TruedepthError, match=r"for 8 layers, but .* has 6"):
        td.convert(make_model(), tmp_path / "out", td.Plan(8))


def test_a_converted_model_cannot_be_converted_again(make_model, tmp_path):
    td.convert(make_model(), tmp_path / "out", PLAN)
    with pytest.raises(td.TruedepthError, match="already layer-parallel"):
        td.convert(tmp_path / "out", tmp_path / "again", td.Plan(4))
