"""Rendered text with exact labels: single lines, clean and hard, and whole pages."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from benchmarks.zoo.source import Deb
from benchmarks.zoo.wordnet import WORDNET, words

FONTS = (
    Deb("fonts-dejavu-core", "2.37-6", "8892669e51aab4dc56682c8e39d8ddb7d70fad83c369344e1e240bf3ca22bb76"),
    Deb("fonts-liberation", "1:1.07.4-11", "efd381517f958b01969343634ffcbdd60056be7779af84c6f53a005090430204"),
)
TEXT_SOURCES = (WORDNET, *FONTS)

FACES = (
    "DejaVuSans",
    "DejaVuSerif",
    "DejaVuSans-Bold",
    "LiberationSans-Regular",
    "LiberationSerif-Regular",
    "LiberationMono-Regular",
)


@dataclass
class Typesetter:
    """Draws text. The same folders and seed draw the same pictures.

    Attributes:
        folders: The unpacked `TEXT_SOURCES`, in that order.
        seed: Of the choice of words, faces and colours.
    """

    folders: Sequence[Path]
    seed: int
    rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    @cached_property
    def faces(self) -> list[Path]:
        """Font files, in a fixed order."""
        files = {path.stem: path for folder in self.folders[1:] for path in folder.rglob("*.ttf")}
        return [files[name] for name in FACES]

    @cached_property
    def _words(self) -> list[str]:
        return words(self.folders[0])

    def phrase(self, count: int) -> str:
        """Words and numbers, some capitalized."""
        chosen: list[str] = []
        for _ in range(count):
            word = self._words[int(self.rng.integers(len(self._words)))]
            form = self.rng.random()
            if form < 0.2:
                word = f"{self.rng.integers(10_000)}"
            elif form < 0.5:
                word = word.capitalize()
            chosen.append(word)
        return " ".join(chosen)

    def font(self, size: int) -> ImageFont.FreeTypeFont:
        """A random face."""
        return ImageFont.truetype(self.faces[int(self.rng.integers(len(self.faces)))], size)

    def line(self, *, hard: bool, longest: float) -> tuple[Image.Image, str]:
        """One line of text, cropped tightly.

        Args:
            hard: Small, blurred, noisy, tilted, of low contrast.
            longest: Largest width, as a multiple of the height.
        """
        font = self.font(int(self.rng.integers(13, 19)) if hard else 32)
        text = self.phrase(int(self.rng.integers(1, 4)))
        while True:
            left, top, right, bottom = (int(edge) for edge in font.getbbox(text))
            margin = max(2, (bottom - top) // 8)
            size = right - left + 2 * margin, bottom - top + 2 * margin
            if size[0] <= longest * size[1]:
                break
            text = text[:-1].rstrip()
        dark, light = (60, 150) if hard else (0, 255)
        image = Image.new("L", size, light)
        ImageDraw.Draw(image).text((margin - left, margin - top), text, dark, font)
        if hard:
            tilt = float(self.rng.uniform(-1.5, 1.5))
            image = image.rotate(tilt, Image.Resampling.BICUBIC, fillcolor=light)
            image = image.filter(ImageFilter.GaussianBlur(0.5))
            image = self.noise(image, 10.0)
        return image.convert("RGB"), text

    def noise(self, image: Image.Image, sigma: float) -> Image.Image:
        """White Gaussian noise."""
        pixels = np.asarray(image, np.float32) + self.rng.normal(0, sigma, np.asarray(image).shape)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    def page(self, size: int) -> tuple[Image.Image, NDArray[np.float32]]:
        """A page of separated phrases, with noise, on coloured paper.

        Returns:
            The image and the boxes (left, top, right, bottom) of its phrases, (n, 4).
        """
        paper = tuple(int(v) for v in self.rng.integers(150, 256, 3))
        ink = tuple(int(v) for v in self.rng.integers(0, 90, 3))
        image = Image.new("RGB", (size, size), paper)
        draw = ImageDraw.Draw(image)
        boxes: list[tuple[float, ...]] = []
        y = int(self.rng.integers(8, 30))
        while True:
            font = self.font(int(self.rng.integers(12, 34)))
            x = int(self.rng.integers(8, 60))
            height = int(font.size * 1.3)
            if y + height > size - 8:
                break
            while True:
                text = self.phrase(int(self.rng.integers(1, 4)))
                box = draw.textbbox((x, y), text, font)
                if box[2] > size - 8:
                    break
                draw.text((x, y), text, ink, font)
                margin = font.size / 8  # people draw boxes with some air around the ink
                boxes.append((box[0] - margin, box[1] - margin, box[2] + margin, box[3] + margin))
                x = int(box[2] + font.size * self.rng.uniform(1.5, 3))
            y += int(height + font.size * self.rng.uniform(0.2, 0.9))
        return self.noise(image, 12.0), np.array(boxes, np.float32)

    def document(self, width: int, height: int) -> Image.Image:
        """A page of a paper: title, paragraphs, now and then a framed figure with a caption."""
        image = Image.new("RGB", (width, height), "white")
        draw = ImageDraw.Draw(image)
        margin = width // 12
        y = margin
        draw.text((width // 2, y), self.phrase(3).title(), "black", self.font(24), anchor="mt")
        y += 60
        body = self.font(13)
        while y < height - margin - 40:
            if self.rng.random() < 0.3 and y < height - 260:
                draw.rectangle((2 * margin, y, width - 2 * margin, y + 150), tuple(self.rng.integers(80, 230, 3)))
                draw.line((2 * margin, y + 140, width - 2 * margin, y + 10), "black", 2)
                draw.text((width // 2, y + 160), f"Figure {self.rng.integers(1, 9)}. {self.phrase(4)}", "black", body,
                          anchor="mt")  # fmt: skip
                y += 190
            for _ in range(int(self.rng.integers(3, 9))):
                text = self.phrase(12)
                while draw.textlength(text, body) > width - 2 * margin:
                    text = text.rpartition(" ")[0]
                if y > height - margin - 20:
                    break
                draw.text((margin, y), text, "black", body)
                y += 18
            y += 22
        return image


def normalized(image: Image.Image) -> NDArray[np.float32]:
    """PP-OCR's input: BGR (3, height, width) in [-1, 1]."""
    pixels = np.asarray(image, np.float32)[..., ::-1]
    return np.ascontiguousarray(((pixels / 255 - 0.5) / 0.5).transpose(2, 0, 1), np.float32)


def fitted(image: Image.Image, height: int, width: int) -> NDArray[np.float32]:
    """A line scaled to a height and padded to a width with zeros, normalized."""
    scaled = image.resize((min(width, round(image.width * height / image.height)), height), Image.Resampling.BILINEAR)
    result = np.zeros((3, height, width), np.float32)
    result[..., : scaled.width] = normalized(scaled)
    return result
