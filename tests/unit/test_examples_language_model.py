"""The pure parts of examples/language_model: parameter counts, corpus, windows, loss, schedule."""

import importlib
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples" / "language_model"


def load_example(folder: Path, *names: str) -> list[ModuleType]:
    """Import an example's modules, then forget their names: another example has a `model` too."""
    before = {name: sys.modules.pop(name, None) for name in names}
    sys.path.insert(0, str(folder))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(folder))
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


corpus, model, train = load_example(FOLDER, "corpus", "model", "train")

TINY = model.Size(layers=2, heads=2, width=32, block=16, parameters=0)


# --- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", model.SIZES)
def test_size_has_the_parameters_its_name_promises(name: str) -> None:
    size = model.SIZES[name]
    with torch.device("meta"):
        count = model.count_parameters(model.Transformer(size))
    assert count == size.parameters
    promised = float(name[:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
    assert abs(count - promised) < 0.05 * promised


def test_output_layer_is_tied_to_the_embedding() -> None:
    net = model.Transformer(TINY)
    assert net.head.weight is net.bytes.weight


def test_prediction_does_not_see_later_bytes() -> None:
    torch.manual_seed(0)
    net = model.Transformer(TINY).eval()
    inputs = torch.randint(0, 256, (2, 16))
    changed = inputs.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 256
    before, after = net(inputs), net(changed)
    assert torch.allclose(before[:, :10], after[:, :10], atol=1e-5)
    assert not torch.allclose(before[:, 10:], after[:, 10:], atol=1e-3)


def test_untrained_model_needs_about_eight_bits_a_byte() -> None:
    torch.manual_seed(0)
    windows = torch.randint(0, 256, (4, 17))
    loss, bits, num_bytes = model.language_loss(model.Transformer(TINY), [windows[:, :-1], windows[:, 1:]])
    assert bits.shape == num_bytes.shape == (4,)
    assert num_bytes.tolist() == [16.0] * 4
    assert loss.item() / math.log(2) == pytest.approx(float(bits.mean()), rel=1e-5)
    assert float(bits.mean()) == pytest.approx(8.0, abs=0.2)


def test_loss_falls_in_a_few_steps() -> None:
    torch.manual_seed(0)
    net = model.Transformer(TINY, dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameter_groups(net, weight_decay=0.1), lr=1e-2)
    windows = torch.frombuffer(bytearray(b"for item in items:\n    print(item)\n" * 8), dtype=torch.uint8)
    batch = torch.utils.data.default_collate(list(corpus.Windows(windows, 16)))
    losses = []
    for _ in range(40):
        loss = model.language_loss(net, batch)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_every_parameter_is_in_one_group_and_norms_do_not_decay() -> None:
    net = model.Transformer(TINY)
    decayed, plain = model.parameter_groups(net, weight_decay=0.1)
    assert len(decayed["params"]) + len(plain["params"]) == len(list(net.parameters()))
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(parameter.dim() == 1 for parameter in plain["params"])


def test_schedule_rises_then_falls_and_stays_at_its_floor() -> None:
    factor = model.warm_up_then_cosine(50, warm_up=0.1, floor=0.1)
    assert factor(0) == pytest.approx(0.2)
    assert factor(5) == pytest.approx(1.0)
    assert [factor(50), factor(1000)] == pytest.approx([0.1, 0.1])


# --- the corpus -----------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small library: 40 modules, and folders that must not be read."""
    for number in range(40):
        folder = tmp_path / ("b" if number % 2 else "a")
        folder.mkdir(exist_ok=True)
        (folder / f"m{number}.py").write_text(f"VALUE = {number}\n" * 10)
    for name in ("site-packages", "test", "a/tests", "idlelib", "__pycache__"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "hidden.py").write_text("HIDDEN = 1\n")
    (tmp_path / "a" / "notes.txt").write_text("HIDDEN")
    return tmp_path


def test_corpus_is_sorted_and_leaves_packages_and_tests_out(source: Path) -> None:
    names = [path.relative_to(source).as_posix() for path in corpus.list_source_files(source)]
    assert names == sorted(names)
    assert len(names) == 40
    assert not any("hidden" in name for name in names)


def test_corpus_does_not_depend_on_the_order_of_listing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = corpus.load_corpus(1.0, source)
    walk = corpus.os.walk

    def backwards(root: Path):  # type: ignore[no-untyped-def]
        for folder, subfolders, names in walk(root):
            subfolders.reverse()
            yield folder, subfolders, names[::-1]

    monkeypatch.setattr(corpus.os, "walk", backwards)
    assert all(torch.equal(left, right) for left, right in zip(expected, corpus.load_corpus(1.0, source), strict=True))


def test_held_out_files_are_whole_files(source: Path) -> None:
    training, held_out = (bytes(part.tolist()) for part in corpus.load_corpus(1.0, source))
    pieces = [part.split(corpus.SEPARATOR)[:-1] for part in (training, held_out)]
    assert len(pieces[0]) + len(pieces[1]) == 40
    assert set(pieces[0]).isdisjoint(pieces[1])


def test_corpus_is_capped(source: Path) -> None:
    assert sum(len(content) for _, content in corpus.read_files(source, 1000)) == 1000


def test_standard_library_gives_a_corpus_and_the_same_twice() -> None:
    first, second = corpus.load_corpus(1.0), corpus.load_corpus(1.0)
    assert sum(map(len, first)) == 1_000_000
    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))
    assert 0.01 < len(first[1]) / 1e6 < 0.4


def test_folder_without_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(corpus.CorpusError, match="0 bytes"):
        corpus.load_corpus(1.0, tmp_path)


# --- windows --------------------------------------------------------------------------------------------------------


def test_targets_are_the_inputs_moved_on_by_one_byte() -> None:
    windows = corpus.Windows(torch.arange(101, dtype=torch.uint8), block=10)
    assert len(windows) == 10
    assert windows[0][0].tolist() == list(range(10))
    assert windows[0][1].tolist() == list(range(1, 11))
    assert windows[9][1][-1] == 100


@pytest.mark.parametrize("count", [1, 3, 500])
def test_windows_are_spread_over_the_whole_corpus(count: int) -> None:
    windows = corpus.Windows(torch.arange(201, dtype=torch.uint8), block=10, count=count)
    starts = [int(inputs[0]) for inputs, _ in windows]
    assert len(starts) == count
    assert starts == sorted(starts)
    assert starts[0] == 0
    assert count == 1 or starts[-1] == 190


def test_corpus_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(corpus.CorpusError, match="too few"):
        corpus.Windows(torch.zeros(10, dtype=torch.uint8), block=10)


# --- the script -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "steps", "epochs"),
    [([], 100, 4), (["--steps", "30"], 30, 4), (["--steps", "2"], 2, 2), (["--epochs", "3"], None, 3)],
)
def test_steps_and_epochs_say_how_long_to_train(flags: list[str], steps: int | None, epochs: int) -> None:
    args = train.parse_args(flags)
    assert (args.steps, args.epochs) == (steps, epochs)


def test_steps_fix_the_windows_of_an_epoch() -> None:
    args = train.parse_args(["--steps", "10", "--epochs", "4", "--global-batch-size", "8", "--corpus-mb", "0.3"])
    train_set, eval_set = train.build_data(args, block=64)
    assert len(train_set) == 3 * 8
    assert len(eval_set) == args.eval_windows
