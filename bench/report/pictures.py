"""How does an image become part of the page?"""

import base64
import io

import numpy as np
from PIL import Image

NUM_COLUMNS, NUM_ROWS = 10, 2  # of samples
CELL_PIXELS = 64  # larger samples are made smaller, so that a hundred runs fit into a page
SHOWN_PIXELS = 40  # about so wide is a small sample shown
NUM_COLOURS = 256
UNSEEN = 1.0  # mean difference, of 255, up to which fewer colours look the same


def data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def smaller(png: bytes) -> bytes:
    """The same picture in a palette, a third of the size, where nobody sees the difference; else as it is."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    reduced = image.quantize(NUM_COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    before, after = (np.asarray(each, dtype=float) for each in (image, reduced.convert("RGB")))
    content = _png(reduced)
    return content if np.abs(before - after).mean() <= UNSEEN and len(content) < len(png) else png


def size_of(png: bytes) -> tuple[int, int]:
    """Width and height in pixels."""
    return Image.open(io.BytesIO(png)).size


def contact_sheet(images: np.ndarray) -> tuple[bytes, int] | None:
    """The first samples (n, H, W, C) uint8 side by side, and how wide to show them, in pixels of the screen.

    None if they are no pixels. Small images stay as they are: the browser enlarges them.
    """
    channels = images.shape[-1]
    if channels not in (1, 3) or not len(images):
        return None
    cells = [_cell(image) for image in images[: NUM_COLUMNS * NUM_ROWS]]
    width, height = cells[0].size
    gap = max(1, width // 16)
    columns, rows = min(NUM_COLUMNS, len(cells)), -(-len(cells) // NUM_COLUMNS)
    sheet = Image.new("LA" if channels == 1 else "RGBA", (columns * (width + gap) - gap, rows * (height + gap) - gap))
    for i, cell in enumerate(cells):
        sheet.paste(cell.convert(sheet.mode), (i % NUM_COLUMNS * (width + gap), i // NUM_COLUMNS * (height + gap)))
    return _png(sheet), sheet.width * max(1, round(SHOWN_PIXELS / width))


def _cell(image: np.ndarray) -> Image.Image:
    cell = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    return cell.resize((CELL_PIXELS, CELL_PIXELS), Image.Resampling.LANCZOS) if cell.width > CELL_PIXELS else cell


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "png", optimize=True)
    return content.getvalue()
