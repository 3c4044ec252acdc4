"""The pure parts of examples/price_prediction: reader, synthetic sample, tokenizer, split, model, predictions."""

import csv
import importlib
import itertools
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

FOLDER = Path(__file__).parents[2] / "examples" / "price_prediction"


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


data, model, train, predict = load_example(FOLDER, "data", "model", "train", "predict")

HEADER = "sample_id,catalog_content,image_link,price\n"


def write(path: Path, content: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(content.encode(encoding))
    return path


@pytest.fixture
def csv_path(tmp_path: Path) -> Path:
    return tmp_path / "train.csv"


# --- the reader -----------------------------------------------------------------------------------------------------


def test_newlines_and_quotes_inside_a_field_are_text(csv_path: Path) -> None:
    write(
        csv_path,
        HEADER + '1,"Item Name: Tea, 3 Ounce\nBullet Point 1: ""Best"" tea\r\nValue: 3.0",http://x/1.jpg,4.5\n',
    )
    products, report = data.read_products(csv_path, priced=True)
    text = 'Item Name: Tea, 3 Ounce\nBullet Point 1: "Best" tea\r\nValue: 3.0'
    assert products == [data.Product("1", text, 4.5)]
    assert report.describe() == f"{csv_path}: 1 rows kept"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_unicode_and_empty_links_are_kept(csv_path: Path, encoding: str) -> None:
    write(csv_path, HEADER + "ñ-1,Crème Brûlée 抹茶 🍵,,7\n", encoding)
    products, _ = data.read_products(csv_path, priced=True)
    assert products == [data.Product("ñ-1", "Crème Brûlée 抹茶 🍵", 7.0)]


@pytest.mark.parametrize("price", ["", " ", "-1", "-0.01", "nan", "inf", "n/a", "$4.50", "1,299"])
def test_row_without_usable_price_is_left_out_and_counted(csv_path: Path, price: str) -> None:
    write(csv_path, HEADER + f'1,Tea,,"{price}"\n2,Tea,,3\n')
    products, report = data.read_products(csv_path, priced=True)
    assert [product.sample_id for product in products] == ["2"]
    assert report.unusable_prices == 1
    assert "1 without a usable price" in report.describe()


def test_zero_is_a_price(csv_path: Path) -> None:
    products, report = data.read_products(write(csv_path, HEADER + "1,Free sample,,0\n"), priced=True)
    assert products[0].price == 0.0
    assert report.unusable_prices == 0


def test_first_of_duplicate_ids_is_kept_and_the_rest_counted(csv_path: Path) -> None:
    write(csv_path, HEADER + "1,first,,1\n2,other,,2\n1,second,,3\n1,third,,4\n")
    products, report = data.read_products(csv_path, priced=True)
    assert [(product.sample_id, product.text) for product in products] == [("1", "first"), ("2", "other")]
    assert report.duplicate_ids == 2
    assert "2 repeating an earlier sample_id" in report.describe()


def test_short_and_empty_rows_do_not_stop_the_reader(csv_path: Path) -> None:
    write(csv_path, HEADER + "1,Tea\n\n,Tea,,3\n2,Tea,,3,surplus\n")
    products, report = data.read_products(csv_path, priced=True)
    assert [product.sample_id for product in products] == ["2"]
    assert (report.unusable_prices, report.missing_ids) == (1, 1)


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ("id,text,image_link,price\n", "id, text, image_link, price"),
        ("", "nothing"),
        ("sample_id;price\n", "sample_id;price"),
    ],
)
def test_wrong_header_is_one_paragraph_naming_file_expected_and_found(csv_path: Path, header: str, found: str) -> None:
    with pytest.raises(data.DataError) as caught:
        data.read_products(write(csv_path, header + "1,Tea,,3\n" if header else ""), priced=True)
    message = str(caught.value)
    assert str(csv_path) in message
    assert "Expected columns: sample_id, catalog_content, image_link, price" in message
    assert f"found: {found}" in message
    assert "\n" not in message


def test_test_file_needs_no_price_and_ignores_one(csv_path: Path) -> None:
    write(csv_path, "price,sample_id,catalog_content\nx,7,Tea\n")
    products, _ = data.read_products(csv_path, priced=False)
    assert products == [data.Product("7", "Tea", None)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (HEADER.encode() + b'1,"never closed,,3\n2,Tea,,4\n', "unclosed quote"),
        (HEADER.encode() + b"1,caf\xe9,,3\n", "not UTF-8"),
        (HEADER.encode() + b"1,Tea,,free\n", "Not one row can be used"),
    ],
)
def test_unreadable_file_is_refused_with_the_reason(csv_path: Path, content: bytes, reason: str) -> None:
    csv_path.write_bytes(content)
    with pytest.raises(data.DataError, match=reason):
        data.read_products(csv_path, priced=True)


def test_missing_file_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match=r"absent\.csv: cannot be opened"):
        data.read_products(tmp_path / "absent.csv", priced=True)


def test_field_longer_than_the_csv_modules_limit_is_read(csv_path: Path) -> None:
    write(csv_path, HEADER + f"1,{'long ' * 50_000},,3\n")
    assert len(data.read_products(csv_path, priced=True)[0][0].text) == 250_000


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=1, max_size=5),
    price=st.floats(0, 1e6),
)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, texts: list[str], price: float) -> None:
    path = tmp_path_factory.mktemp("roundtrip") / "products.csv"
    products = [data.Product(str(number), text, price) for number, text in enumerate(texts)]
    data.write_products(path, products, priced=True)
    assert data.read_products(path, priced=True)[0] == products


# --- the synthetic sample and the split -----------------------------------------------------------------------------


def test_synthetic_sample_is_a_function_of_its_seed() -> None:
    assert data.synthetic_products(50) == data.synthetic_products(80)[:50]
    assert data.synthetic_products(50) != data.synthetic_products(50, seed=1)
    first = data.synthetic_products(1)[0]
    assert first.text.startswith("Item Name: ")
    assert "\nValue: " in first.text
    assert "\nUnit: " in first.text
    assert first.price > 0


def test_split_depends_on_ids_alone() -> None:
    products = data.synthetic_products(3000)
    training, validation = data.split(products)
    assert {product.sample_id for product in training}.isdisjoint(product.sample_id for product in validation)
    assert 0.07 < len(validation) / len(products) < 0.13
    shuffled = random.Random(0).sample(products, len(products))
    assert {product.sample_id for product in data.split(shuffled)[1]} == {product.sample_id for product in validation}


def test_split_of_too_few_rows_is_refused() -> None:
    with pytest.raises(data.DataError, match="too few"):
        data.split(data.synthetic_products(1))


# --- text to tensors ------------------------------------------------------------------------------------------------


def test_tokens_are_the_same_in_another_process() -> None:
    text = "Crème Brûlée Mix, 4 Ounce (Pack of 6)"
    code = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import data; print(data.tokenize({text!r}))"
    other = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert other.stdout.strip() == str(data.tokenize(text))


def test_dataset_items_have_one_shape() -> None:
    products = [data.Product("1", "", 1.0), data.Product("2", "word " * 5000, None), *data.synthetic_products(3)]
    dataset = data.PriceDataset(products)
    batch = torch.utils.data.default_collate([dataset[index] for index in range(len(dataset))])
    assert batch["tokens"].shape == (5, data.MAX_TOKENS)
    assert int(batch["tokens"].max()) < data.NUM_BUCKETS
    assert int(batch["tokens"][0].sum()) == 0
    assert batch["numbers"].shape == (5, data.NUM_NUMBERS)
    assert math.isnan(batch["price"][1])


def test_value_and_pack_count_are_read_from_the_text() -> None:
    assert data.numbers("Honey (Pack of 3)\nValue: 26.4\nUnit: Ounce") == [math.log1p(26.4), math.log1p(3)]
    assert data.numbers("no figures") == [0.0, math.log1p(1)]
    assert all(map(math.isfinite, data.numbers("Value: " + "9" * 400)))


# --- the model ------------------------------------------------------------------------------------------------------


def smape(prediction: torch.Tensor, target: torch.Tensor) -> float:
    """In percent, 0 to 200."""
    return float((200 * (prediction - target).abs() / (prediction.abs() + target.abs())).mean())


@pytest.mark.parametrize("lr", sorted({preset.lr for preset in train.PRESETS.values()}))
def test_smape_falls_on_the_synthetic_sample(lr: float) -> None:
    torch.manual_seed(0)
    dataset = data.PriceDataset(data.synthetic_products(256))
    batch = dataset[slice(None)]
    net = model.PriceModel(start=dataset.mean_log_price(), dropout=0.0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    before = smape(model.price_loss(net, batch)[1], batch["price"])
    for _ in range(100):
        loss, prediction, target = model.price_loss(net, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert smape(prediction, target) < before - 10


def test_predictions_are_finite_prices_of_at_least_a_cent() -> None:
    prices = model.to_price(torch.tensor([-5.0, 0.0, math.log1p(20.0), 1000.0]))
    assert prices[:2].tolist() == pytest.approx([0.01, 0.01])
    assert float(prices[2]) == pytest.approx(20.0)
    assert math.isfinite(prices[3])


def test_text_without_a_token_has_a_prediction() -> None:
    net = model.PriceModel(start=1.0).eval()
    assert torch.isfinite(net(torch.zeros(2, data.MAX_TOKENS, dtype=torch.int32), torch.zeros(2, 2))).all()


def test_schedule_rises_then_falls_and_stays_at_its_floor() -> None:
    factor = model.warm_up_then_cosine(100, warm_up=0.1, floor=0.05)
    values = [factor(update) for update in range(120)]
    assert values[:10] == pytest.approx([0.1 * (update + 1) for update in range(10)])
    assert all(later <= earlier for earlier, later in itertools.pairwise(values[10:]))
    assert values[100:] == pytest.approx([0.05] * 20)


# --- the scripts ----------------------------------------------------------------------------------------------------


def test_preset_gives_defaults_and_flags_override() -> None:
    args = train.parse_args(["--preset", "blazing"])
    assert (args.epochs, args.lr, args.accumulation, args.run_dir) == (10, 3e-4, 8, "runs/blazing")
    args = train.parse_args(["--preset", "ultra", "--epochs", "25", "--accumulation", "2"])
    assert (args.epochs, args.lr, args.accumulation, args.run_dir) == (25, 1e-4, 2, "runs/ultra")


def test_sample_is_said_to_be_synthetic(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    train.load_products(None, 20)
    assert "SYNTHETIC" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    train.load_products(None, 20)
    assert capsys.readouterr().out == ""


def test_submission_has_every_id_once_in_input_order(tmp_path: Path) -> None:
    ids = ["9", "3", "ñ,1", "7"]
    source = write(
        tmp_path / "test.csv", "sample_id,catalog_content,image_link\n" + '9,Tea,\n3,,\n"ñ,1",Oil,\n9,x,\n7,Mix,\n'
    )
    products, _ = data.read_products(source, priced=False)
    prices = predict.predict_prices(model.PriceModel(), data.PriceDataset(products), torch.device("cpu"), batch_size=3)
    predict.write_submission(tmp_path / "submission.csv", [product.sample_id for product in products], prices)
    with (tmp_path / "submission.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["sample_id", "price"]
    assert [row["sample_id"] for row in rows] == ids
    assert all(float(row["price"]) >= 0.01 for row in rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["submission.csv", "test.csv"]
