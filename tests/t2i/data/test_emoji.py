"""Small pictures on white: reading, cutting out, recolouring."""

import colorsys
import csv

import numpy as np
import pytest

from gencompress.files import FormatError
from gencompress.t2i.data.emoji import COLORS, COLUMNS, cut_out, read_sprites, recolor

SIZE = 16


def disc(color=(30, 90, 200), size=SIZE, radius=5.0, smooth=True):
    """uint8 [S, S, 3]: a disc on white, its rim blended; and float [S, S], how much it covers."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    distance = radius + 0.5 - np.hypot(x, y)
    cover = np.clip(distance, 0, 1) if smooth else (distance > 0).astype(float)
    mixed = cover[..., None] * np.array(color) + (1 - cover[..., None]) * 255
    return np.rint(mixed).astype(np.uint8), cover


def over(rgba, ground):
    return rgba[..., :3] + (1 - rgba[..., 3:]) * np.asarray(ground)


def write(folder, images, rows, columns=COLUMNS):
    np.savez(folder / "emoji64.npz", images=images)
    with (folder / "emoji64_captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


ROW = ("noto", "red car", "car", "Travel", "train")


# reading


def test_reads_pictures_with_their_rows(tmp_path):
    images = np.stack([disc()[0], disc((200, 20, 20))[0]])
    write(tmp_path, images, [ROW, ("fluent3d", "dog face", "dog", "Animals", "val")])
    car, dog = read_sprites(tmp_path)
    assert (car.style, car.name, car.short_name, car.group, car.train) == (*ROW[:4], True)
    assert dog.short_name == "dog" and not dog.train
    assert dog.rgba.dtype == np.float32 and dog.rgba.shape == (SIZE, SIZE, 4)
    assert dog.rgba[8, 8, :3] * 255 == pytest.approx([200, 20, 20], abs=0.01)


@pytest.mark.parametrize(
    ("images", "rows", "columns", "message"),
    [
        (np.zeros((1, 4, 4, 3)), [ROW], COLUMNS, "float64"),
        (np.zeros((1, 4, 4), np.uint8), [ROW], COLUMNS, r"expected uint8 \[N, S, S, 3\]"),
        (np.zeros((1, 4, 4, 4), np.uint8), [ROW], COLUMNS, "expected uint8"),
        (np.zeros((1, 4, 5, 3), np.uint8), [ROW], COLUMNS, "expected square ones"),
        (np.zeros((2, 4, 4, 3), np.uint8), [ROW], COLUMNS, "1 rows for 2 images"),
        (np.zeros((1, 4, 4, 3), np.uint8), [], COLUMNS, "0 rows for 1 images"),
        (np.zeros((1, 4, 4, 3), np.uint8), [ROW[:4]], COLUMNS[:4], "no column split"),
    ],
)
def test_files_that_do_not_fit(tmp_path, images, rows, columns, message):
    write(tmp_path, images, rows, columns)
    with pytest.raises(FormatError, match=message):
        read_sprites(tmp_path)


def test_files_that_are_missing(tmp_path):
    with pytest.raises(FormatError, match="emoji64.npz: .*no such file"):
        read_sprites(tmp_path)
    np.savez(tmp_path / "emoji64.npz", pictures=np.zeros(1))
    with pytest.raises(FormatError, match="emoji64_captions.csv: .*no such file"):
        read_sprites(tmp_path)
    (tmp_path / "emoji64_captions.csv").write_text(",".join(COLUMNS))
    with pytest.raises(FormatError, match="holds pictures; expected `images`"):
        read_sprites(tmp_path)


def test_pickles_are_not_read(tmp_path):
    write(tmp_path, np.array([{"a": 1}], object), [ROW])
    with pytest.raises(ValueError, match="allow_pickle|[Oo]bject"):
        read_sprites(tmp_path)


# cutting out


def test_over_white_it_is_the_picture_again():
    picture, _ = disc()
    assert over(cut_out(picture), (1, 1, 1)) * 255 == pytest.approx(picture, abs=1e-3)


def test_the_ground_is_clear_and_the_inside_solid():
    picture, cover = disc()
    alpha = cut_out(picture)[..., 3]
    assert (alpha[cover == 0] == 0).all() and (alpha[cover == 1] == 1).all()
    assert alpha == pytest.approx(cover, abs=0.02)


def test_no_white_rim_is_left_over_black():
    picture, cover = disc((200, 20, 20))
    black = over(cut_out(picture), (0, 0, 0)) * 255
    assert black == pytest.approx(cover[..., None] * np.array([200, 20, 20]), abs=3)


def test_white_inside_stays_solid():
    picture, _ = disc(radius=6)
    picture[6:10, 6:10] = 255
    assert (cut_out(picture)[6:10, 6:10] == 1).all()


def test_all_white_is_all_clear():
    assert (cut_out(np.full((SIZE, SIZE, 3), 255, np.uint8)) == 0).all()


def test_colours_are_premultiplied_within_bounds(generator):
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    for picture in (noise, disc()[0], disc(smooth=False)[0]):
        rgba = cut_out(picture)
        assert rgba.min() >= 0 and rgba.max() <= 1
        assert (rgba[..., :3] <= rgba[..., 3:] + 1e-5).all()


# recolouring


def shaded():
    """A disc whose shading runs from dark to light."""
    picture, cover = disc((100, 100, 100), radius=6)
    ramp = np.linspace(40, 200, SIZE)[:, None, None]
    mixed = cover[..., None] * ramp + (1 - cover[..., None]) * 255
    return cut_out(np.rint(np.broadcast_to(mixed, picture.shape)).astype(np.uint8))


def mean_color(rgba):
    return rgba[..., :3].sum((0, 1)) / rgba[..., 3].sum()


CHROMATIC = [name for name in COLORS if name not in ("gray", "black", "white")]


@pytest.mark.parametrize("name", CHROMATIC)
def test_the_mean_hue_is_that_of_the_colour(name):
    hue, saturation, _ = colorsys.rgb_to_hsv(*mean_color(recolor(shaded(), name)))
    wanted, _, _ = colorsys.rgb_to_hsv(*(np.array(COLORS[name]) / 255))
    assert abs((hue - wanted + 0.5) % 1 - 0.5) < 0.02
    assert saturation > 0.25


def test_grey_tones_are_grey_and_in_order():
    means = [mean_color(recolor(shaded(), name)) for name in ("black", "gray", "white")]
    assert all(np.ptp(mean) < 0.03 for mean in means)
    assert means[0].mean() < means[1].mean() - 0.2 < means[2].mean() - 0.4


def test_every_colour_is_nearest_to_itself():
    means = {name: mean_color(recolor(shaded(), name)) for name in COLORS}
    flat = np.ones((SIZE, SIZE, 4), np.float32)
    for name, mean in means.items():
        assert min(means, key=lambda n: np.abs(means[n] - mean).sum()) == name
    assert len({tuple(recolor(flat, name)[0, 0].round(4)) for name in COLORS}) == len(COLORS)


def test_shape_and_shading_stay():
    rgba = shaded()
    for name in COLORS:
        colored = recolor(rgba, name)
        assert colored.dtype == np.float32
        assert np.array_equal(colored[..., 3], rgba[..., 3])
        assert colored.min() >= 0 and (colored[..., :3] <= colored[..., 3:] + 1e-5).all()
        column = colored[3:13, 8, :3].sum(1)
        assert (np.diff(column) > -1e-6).all() and column[-1] > column[0]


def test_the_caller_keeps_his_picture():
    rgba = shaded()
    before = rgba.copy()
    recolor(rgba, "red")
    assert np.array_equal(rgba, before)


def test_nothing_to_colour():
    assert (recolor(np.zeros((4, 4, 4), np.float32), "red") == 0).all()


def test_an_unknown_colour():
    with pytest.raises(KeyError):
        recolor(shaded(), "beige")


def test_the_real_pictures(shared_data):
    sprites = read_sprites(shared_data / "t2i")
    assert len(sprites) > 3000 and {sprite.style for sprite in sprites} == {"noto", "fluent3d"}
    assert 0.85 < np.mean([sprite.train for sprite in sprites]) < 0.95
    with np.load(shared_data / "t2i" / "emoji64.npz") as arrays:
        pictures = arrays["images"][::200]
    for sprite, picture in zip(sprites[::200], pictures, strict=True):
        assert over(sprite.rgba, (1, 1, 1)) * 255 == pytest.approx(
            picture, abs=8
        )  # nearly white is ground
        assert 0.05 < (sprite.rgba[..., 3] > 0.5).mean() < 1
