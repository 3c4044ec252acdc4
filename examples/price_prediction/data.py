"""Product texts and prices: a CSV reader, a SYNTHETIC sample, the tokenizer, the split and the dataset.

The file format is that of the Amazon ML Challenge 2025 price task: `sample_id,catalog_content,image_link,price`; a test
file has no price column. Invariant: everything here is a function of the file (or of the seed) alone, the same on
every rank, in every process and at every restart. Images are not downloaded.

New here: data preparation that may be repeated after a crash, because it gives the same bytes each time (crc32 and not
`hash()`, which differs from process to process; a split by id and not by position).

    python examples/price_prediction/data.py --out test.csv --samples 500 --without-price     write the synthetic sample
"""

import argparse
import csv
import math
import random
import re
import sys
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, zip_longest
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

COLUMNS = ("sample_id", "catalog_content", "image_link", "price")
UNUSED_COLUMNS = frozenset({"image_link"})
MAX_FIELD_CHARS = 16 * 2**20
"""Longest catalog text accepted, in characters; the csv module's own limit of 131072 is too short for some shops."""

NUM_BUCKETS = 2**14
"""Rows of the embedding table; bucket 0 is padding."""
MAX_TOKENS = 192
"""Length of every token vector: shorter texts are padded with 0, longer ones cut (character n-grams first)."""
NUM_NUMBERS = 2
"""Numeric features: log(1 + value) and log(1 + pack count)."""


class DataError(Exception):
    """The input cannot be used; the message is one paragraph for people."""


@dataclass(frozen=True, slots=True)
class Product:
    """One row: its id as it stands in the file, its text, its price in the file's currency (None in a test file)."""

    sample_id: str
    text: str
    price: float | None


@dataclass(frozen=True, slots=True)
class ReadReport:
    """What became of the rows of one file, in numbers of rows."""

    path: str
    kept: int
    unusable_prices: int
    duplicate_ids: int
    missing_ids: int

    def describe(self) -> str:
        """Return one line for people; names only what was left out."""
        left_out = [
            f"{count} {what}"
            for count, what in (
                (self.unusable_prices, "without a usable price (missing, negative or not a number)"),
                (self.duplicate_ids, "repeating an earlier sample_id (the first is kept)"),
                (self.missing_ids, "without a sample_id"),
            )
            if count
        ]
        return f"{self.path}: {self.kept} rows kept" + (f"; left out: {', '.join(left_out)}" if left_out else "")


def parse_price(text: str) -> float | None:
    """Return the price, or None where it is missing, not a finite number, or negative. Zero is a price."""
    try:
        price = float(text)
    except ValueError:
        return None
    return price if math.isfinite(price) and price >= 0 else None


def check_header(path: Path, found: Sequence[str], priced: bool) -> None:
    """Raise DataError unless every column that is used is there; order and further columns do not matter."""
    expected = [name for name in COLUMNS if priced or name != "price"]
    missing = [name for name in expected if name not in found and name not in UNUSED_COLUMNS]
    if missing:
        raise DataError(
            f"{path}: the header lacks {', '.join(missing)}. Expected columns: {', '.join(expected)}; "
            f"found: {', '.join(found) or 'nothing, the file is empty'}. "
            "Correct the first line of the file, or pass the right file with --data."
        )


def read_rows(path: Path, priced: bool) -> Iterator[dict[str, str]]:
    """Yield the rows as {column: text}, missing fields as ''. Raises DataError with the reason and the line."""
    csv.field_size_limit(MAX_FIELD_CHARS)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # newline="": newlines inside quotes are data
            rows = csv.reader(file, strict=True)  # strict: an unclosed quote is an error, not the rest of the file
            try:
                header = [name.strip() for name in next(rows, [])]
                check_header(path, header, priced)
                for fields in rows:
                    if fields:  # an empty line is no row
                        yield dict(zip_longest(header, fields[: len(header)], fillvalue=""))
            except csv.Error as error:
                raise DataError(
                    f"{path}: cannot be read as CSV near line {rows.line_num}: {error}. Look for an unclosed quote."
                ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 ({error}). Convert it, for instance with iconv.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {error.strerror}. Pass the right file with --data.") from error


def read_products(path: str | Path, *, priced: bool) -> tuple[list[Product], ReadReport]:
    """Read a CSV file.

    Args:
        path: UTF-8, with or without byte order mark.
        priced: True for training: a row needs a usable price. False for a test file: a price column is ignored.

    Returns:
        The products in file order, each sample_id once, and what was left out.

    Raises:
        DataError: no such file, not CSV, wrong header, or not a single usable row.
    """
    path = Path(path)
    products: dict[str, Product] = {}
    unusable_prices = duplicate_ids = missing_ids = 0
    for row in read_rows(path, priced):
        sample_id = row["sample_id"]
        price = parse_price(row["price"]) if priced else None
        if not sample_id.strip():
            missing_ids += 1
        elif sample_id in products:
            duplicate_ids += 1
        elif priced and price is None:
            unusable_prices += 1
        else:
            products[sample_id] = Product(sample_id, row["catalog_content"], price)
    report = ReadReport(str(path), len(products), unusable_prices, duplicate_ids, missing_ids)
    if not products:
        raise DataError(f"{report.describe()}. Not one row can be used; is this the right file?")
    return list(products.values()), report


# --- the synthetic sample -------------------------------------------------------------------------------------------

# product: (price of one piece, unit, usual amounts of one piece)
PRODUCTS: dict[str, tuple[float, str, tuple[float, ...]]] = {
    "Green Tea": (4.0, "Ounce", (1.5, 3.0, 8.0)),
    "Ground Coffee": (7.5, "Ounce", (10.0, 12.0, 24.0)),
    "Olive Oil": (11.0, "Fl Oz", (8.5, 17.0, 33.8)),
    "Taco Sauce": (2.5, "Fl Oz", (8.0, 12.0, 15.0)),
    "Maple Syrup": (14.0, "Fl Oz", (8.0, 16.0, 32.0)),
    "Almond Butter": (9.0, "Ounce", (10.0, 16.0)),
    "Basmati Rice": (6.0, "Pound", (2.0, 5.0, 10.0)),
    "Dark Chocolate": (3.5, "Ounce", (3.0, 3.5, 7.0)),
    "Gummy Candy": (2.0, "Ounce", (5.0, 7.5, 14.0)),
    "Protein Powder": (32.0, "Pound", (1.0, 2.0, 5.0)),
    "Vanilla Extract": (18.0, "Fl Oz", (2.0, 4.0, 8.0)),
    "Saffron Threads": (55.0, "Gram", (1.0, 2.0, 5.0)),
    "Crème Brûlée Mix": (8.0, "Ounce", (4.0, 8.0)),
    "Jalapeño Chips": (3.0, "Ounce", (5.0, 8.0, 13.0)),
    "Dog Biscuits": (10.0, "Pound", (1.0, 4.0)),
    "Baby Cereal": (4.5, "Ounce", (8.0, 16.0)),
    "Sparkling Water": (1.5, "Fl Oz", (12.0, 16.9, 33.8)),
    "Manuka Honey": (38.0, "Ounce", (8.8, 17.6)),
}
BRANDS = {
    "Alder & Finch": 1.6, "Bellweather": 1.0, "Casa Ñandú": 1.2, "Dalton's": 0.8, "Everyday Value": 0.5,
    "Fjordline": 1.5, "Grandma Ruth": 0.9, "Harvest Lane": 0.7, "Imperium Select": 2.4, "Juniper Hill": 1.3,
    "Kestrel Farms": 1.1, "Lumière": 2.0, "Maison Verte": 1.8, "Northgate": 0.75, "Old Mill": 0.95, "Pantry Pal": 0.6,
}  # fmt: skip
QUALITIES = {"Organic": 1.35, "Premium": 1.5, "Classic": 1.0, "Budget": 0.65, "Gourmet": 1.7, "Natural": 1.15}
PACK_COUNTS = (1, 1, 1, 2, 3, 4, 6, 12, 24)
REMARKS = (
    "Made with simple ingredients and no artificial colors",
    "Resealable pouch keeps every serving fresh",
    "A thoughtful gift for friends and family",
    "Carefully packed and shipped from our warehouse",
    "Family recipe, tasted by three generations",
    "Perfect for breakfast, lunch or a quick snack",
    "Store in a cool, dry place",
    "Gluten free and non GMO",
)


def synthetic_product(index: int, seed: int) -> Product:
    """Return row `index` of the SYNTHETIC sample: the text names what the price was computed from, with 12 % noise."""
    rng = random.Random(f"price-sample:{seed}:{index}")
    name = rng.choice(list(PRODUCTS))
    piece_price, unit, amounts = PRODUCTS[name]
    brand, quality = rng.choice(list(BRANDS)), rng.choice(list(QUALITIES))
    amount, pack = rng.choice(amounts), rng.choice(PACK_COUNTS)
    first_remark, second_remark = rng.sample(REMARKS, 2)
    price = piece_price * BRANDS[brand] * QUALITIES[quality]
    price *= (amount / amounts[0]) ** 0.8 * pack**0.9 * math.exp(rng.gauss(0.0, 0.12))
    text = (
        f"Item Name: {brand} {quality} {name}, {amount:g} {unit}{f' (Pack of {pack})' if pack > 1 else ''}\n"
        f"Bullet Point 1: {first_remark}\n"
        f"Bullet Point 2: {second_remark}\n"
        f"Value: {amount * pack:.1f}\n"
        f"Unit: {unit}\n"
    )
    return Product(f"{100000 + index}", text, max(round(price, 2), 0.25))


def synthetic_products(samples: int, seed: int = 0) -> list[Product]:
    """Return the first `samples` rows of the SYNTHETIC sample; a longer one begins with the shorter one."""
    return [synthetic_product(index, seed) for index in range(samples)]


def write_products(path: str | Path, products: Iterable[Product], *, priced: bool) -> None:
    """Write a CSV file in the format of the price task; every tenth image link is empty, as in real files."""
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS if priced else COLUMNS[:-1])
        for number, product in enumerate(products):
            link = f"https://images.example/{product.sample_id}.jpg" if number % 10 else ""
            writer.writerow([product.sample_id, product.text, link, *([product.price] if priced else [])])


# --- text to tensors ------------------------------------------------------------------------------------------------

WORD = re.compile(r"\d+(?:\.\d+)?|\w+")
VALUE = re.compile(r"Value:\s*(\d+(?:\.\d+)?)")
PACK = re.compile(r"pack of (\d+)", re.IGNORECASE)


def bucket(feature: str) -> int:
    """Return the embedding row of a feature, 1 to NUM_BUCKETS - 1, the same in every process."""
    return 1 + zlib.crc32(feature.encode()) % (NUM_BUCKETS - 1)


@lru_cache(maxsize=2**18)
def char_buckets(word: str) -> tuple[int, ...]:
    """Return the buckets of the character 3-grams of `<word>`: near-misses in spelling share most of them."""
    framed = f"<{word}>"
    return tuple(bucket("c:" + framed[start : start + 3]) for start in range(len(framed) - 2))


def tokenize(text: str) -> list[int]:
    """Return at most MAX_TOKENS buckets: words, then word pairs, then character 3-grams of the distinct words."""
    words = WORD.findall(unicodedata.normalize("NFKC", text).lower())[:MAX_TOKENS]
    tokens = [bucket("w:" + word) for word in words]
    tokens += [bucket(f"b:{left} {right}") for left, right in pairwise(words)]
    for word in dict.fromkeys(words):
        if len(tokens) >= MAX_TOKENS:
            break
        tokens += char_buckets(word)
    return tokens[:MAX_TOKENS]


def numbers(text: str) -> list[float]:
    """Return log(1 + value) and log(1 + pack count) as they stand in the text; 0 and log 2 where they do not."""
    values, packs = VALUE.findall(text), PACK.findall(text)
    value = float(values[-1]) if values else 0.0
    pack = float(packs[0]) if packs else 1.0
    return [min(math.log1p(value), 20.0), min(math.log1p(pack), 20.0)]


def in_validation(sample_id: str, fraction: float = 0.1) -> bool:
    """Whether this sample is held out; depends on its id alone, so neither row order nor new rows move it."""
    return zlib.crc32(f"split:{sample_id}".encode()) < fraction * 2**32


def split(products: Sequence[Product], fraction: float = 0.1) -> tuple[list[Product], list[Product]]:
    """Return (training, validation), both in file order. Raises DataError when one of them is empty."""
    held_out = [in_validation(product.sample_id, fraction) for product in products]
    training = [product for product, held in zip(products, held_out, strict=True) if not held]
    validation = [product for product, held in zip(products, held_out, strict=True) if held]
    if not training or not validation:
        raise DataError(
            f"{len(products)} rows are too few: the split by sample_id gave {len(training)} for training and "
            f"{len(validation)} for validation, and both need at least one. Give more rows."
        )
    return training, validation


class PriceDataset(Dataset[dict[str, Tensor]]):
    """Map-style dataset, tokenized once at construction: 4 * (MAX_TOKENS + NUM_NUMBERS + 1) bytes a product.

    An item is {"tokens": int32 [MAX_TOKENS], "numbers": float32 [NUM_NUMBERS], "price": float32 []}; all have a fixed
    shape, so the default collate function works. The price of a test row is NaN.
    """

    def __init__(self, products: Sequence[Product]) -> None:
        self.tokens = torch.zeros(len(products), MAX_TOKENS, dtype=torch.int32)
        for row, product in enumerate(products):
            tokens = tokenize(product.text)
            self.tokens[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        self.numbers = torch.tensor([numbers(product.text) for product in products], dtype=torch.float32)
        prices = [math.nan if product.price is None else product.price for product in products]
        self.prices = torch.tensor(prices, dtype=torch.float32)

    def __len__(self) -> int:
        return len(self.prices)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"tokens": self.tokens[index], "numbers": self.numbers[index], "price": self.prices[index]}

    def mean_log_price(self) -> float:
        """Return the mean of log(1 + price), where the model starts from."""
        return float(torch.log1p(self.prices.double()).mean())


def main() -> int:
    """Write the synthetic sample as a CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="CSV file to write")
    parser.add_argument("--samples", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0, help="another seed, other products")
    parser.add_argument("--without-price", action="store_true", help="leave the price column out, as in a test file")
    args = parser.parse_args()
    write_products(args.out, synthetic_products(args.samples, args.seed), priced=not args.without_price)
    print(f"{args.out}: {args.samples} SYNTHETIC products, seed {args.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
