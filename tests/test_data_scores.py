"""Scores: parsed into note tables, rejected with reasons, split by piece."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from corpus_statistics import (
    BEGIN,
    END,
    FEWEST_FIGURES,
    VERSION,
    counts_table,
    figures,
    held_out_like,
    nearest,
    shared,
)
from music21 import note, stream, tie

from lmd.corpus.analysis import find_key, onset_density
from lmd.corpus.scores import (
    COLLECTIONS,
    TRAINED_ON,
    Piece,
    Shelf,
    cached_piece,
    corpus_files,
    parse_piece,
)
from lmd.errors import LmdError
from lmd.rng import derive_seed


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def written(tmp_path: Path, *parts: stream.Part) -> Path:
    score = stream.Score()
    for part in parts:
        score.append(part)
    path = tmp_path / "piece.musicxml"
    score.write("musicxml", path)
    return path


def part_of(*notes: note.Note) -> stream.Part:
    part = stream.Part()
    part.append(list(notes))
    return part


def test_a_bach_chorale_has_four_voices_and_its_known_first_notes(cache: Path) -> None:
    piece = cached_piece("bach/bwv66.6", cache)
    assert piece.voices == ("Soprano", "Alto", "Tenor", "Bass")
    assert piece.metre == "4/4"
    soprano = piece.table[piece.table[:, 3] == 0]
    assert soprano[:4, 2].tolist() == [73, 71, 69, 71]  # C♯5 B4 A4 B4, as printed
    assert find_key(piece.table[:, 2], piece.table[:, 1]) == ("F♯", "minor")


def test_parsing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        Shelf(("corelli",), tmp_path / name).pieces(["corelli/opus3no1/1grave"])
    files = [sorted((tmp_path / name).rglob("*.json"))[0].read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


def test_tied_notes_sound_once(tmp_path: Path) -> None:
    first, second = note.Note("C4", quarterLength=4), note.Note("C4", quarterLength=2)
    first.tie, second.tie = tie.Tie("start"), tie.Tie("stop")
    rest = [note.Note("D4", quarterLength=1) for _ in range(10)]
    piece = parse_piece("x/tied", written(tmp_path, part_of(first, second, *rest)))
    assert isinstance(piece, Piece)
    assert piece.table[0].tolist() == [0.0, 6.0, 60.0, 0.0, 0.0]
    assert len(piece.notes) == 11


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([[("C4", 1)] * 4], "quarter notes long"),
        ([[("C4", 1)] * 20, [("C4", 1)] * 4], "parts out of step"),
        ([[("C4", 1)] * 16] * 9, "9 parts"),
        ([[("C0", 1)] * 16], "piano's range"),
    ],
)
def test_a_broken_score_is_rejected_with_its_reason(
    tmp_path: Path, parts: list[list[tuple[str, int]]], words: str
) -> None:
    streams = [part_of(*[note.Note(n, quarterLength=q) for n, q in part]) for part in parts]
    result = parse_piece("x/broken", written(tmp_path, *streams))
    assert isinstance(result, str)
    assert words in result


def test_a_torn_file_is_rejected_and_does_not_stop_the_others(tmp_path: Path) -> None:
    path = tmp_path / "torn.musicxml"
    path.write_text("<score-partwise><part-list>")
    result = parse_piece("x/torn", path)
    assert isinstance(result, str)
    assert "music21 cannot read it" in result


def test_pieces_that_begin_with_the_same_tune_are_in_the_same_split() -> None:
    tune = [60, 62, 64, 65, 67, 69, 71, 72, 74, 76]
    a, b = noted("x/a", tune), noted("x/b", [pitch + 5 for pitch in tune])
    assert a.group == b.group
    assert a.split == b.split


def noted(name: str, *voices: list[int]) -> Piece:
    """A piece of these pitches, a quarter note each."""
    notes = [
        (float(onset), 1.0, pitch, voice, 0)
        for voice, pitches in enumerate(voices)
        for onset, pitch in enumerate(pitches)
    ]
    return Piece(name, "x", name, ("v",) * len(voices), "4/4", (0.0,), tuple(sorted(notes)))


def test_a_version_is_known_behind_an_upbeat_in_another_voice_key_and_rhythm() -> None:
    g = np.random.default_rng(0)
    tune, bass, other = (60 + g.integers(-9, 10, 60).cumsum() for _ in range(3))
    piece = figures(noted("x/a", tune.tolist(), bass.tolist()).table)
    held = np.repeat(tune + 5, 2)  # every note twice, a fourth higher
    version = noted("x/b", other.tolist(), [40, 43, *held.tolist()])
    assert shared(figures(version.table), piece) > 0.9
    assert shared(figures(noted("x/c", other.tolist()).table), piece) == 0
    part = noted("x/d", [*tune[:20].tolist(), *other.tolist()])
    assert 0.1 < shared(figures(part.table), piece) < VERSION
    short = figures(noted("x/e", tune[:17].tolist(), other.tolist()).table)
    assert len(short[0]) < FEWEST_FIGURES
    assert short[0] <= piece[0]
    assert shared(short, piece) < VERSION  # all of its tune is there, but so little says nothing


def test_held_out_pieces_have_no_version_that_is_trained_on(cache: Path) -> None:
    """Some that the draw would hold out; `tools/corpus_statistics.py` compares all pieces."""
    versions = {"69.6-a": "12.7", "248.35-3": "248.35-3c", "288": "289", "11.6": "43.11"}
    names = [f"bach/bwv{number}" for pair in versions.items() for number in pair]
    pieces = {piece.piece_id: piece for piece in Shelf(("bach",), cache).pieces(names)}
    for piece in pieces.values():
        assert piece.split == "train", piece.piece_id
    for held, trained in ((f"bach/bwv{a}", f"bach/bwv{b}") for a, b in versions.items()):
        assert derive_seed(0, "split", pieces[held].group) % 16 < 2, held
        found = {name: figures(pieces[name].table) for name in (held, trained)}
        assert nearest([held], [trained], found)[held][0] >= VERSION
    unlisted = [replace(piece, piece_id=f"y/{name}") for name, piece in pieces.items()]
    with pytest.raises(LmdError, match=r"y/bach/bwv69\.6-a \(y/bach/bwv12\.7\)"):
        held_out_like(unlisted)
    assert set(corpus_files(("bach",))) >= TRAINED_ON


def test_files_that_reserve_all_rights_are_left_out(cache: Path) -> None:
    shelf = Shelf(("monteverdi",), cache)
    wanted = [name for name in shelf.ids if "madrigal.5.2" in name]
    assert wanted
    assert shelf.pieces(wanted) == []
    assert "reserve all rights" in shelf.rejected[wanted[0]]


def test_unknown_names_are_refused_by_name(cache: Path) -> None:
    with pytest.raises(LmdError, match="nobody"):
        corpus_files(("nobody",))
    with pytest.raises(LmdError, match="bach/none"):
        cached_piece("bach/none", cache)


@pytest.mark.parametrize("tonic", range(12))
@pytest.mark.parametrize("mode", ["major", "minor"])
def test_a_scale_with_its_triad_is_heard_in_its_key(tonic: int, mode: str) -> None:
    scale = [0, 2, 4, 5, 7, 9, 11] if mode == "major" else [0, 2, 3, 5, 7, 8, 11]
    pitches = np.array([60 + tonic + step for step in scale])
    weights = np.array([4, 1, 3, 1, 3, 1, 1.0])
    name, found = find_key(pitches, weights)
    names = ("C", "D♭", "D", "E♭", "E", "F", "F♯", "G", "A♭", "A", "B♭", "B")
    assert (name, found) == (names[tonic], mode)


def test_density_counts_a_chord_once() -> None:
    assert onset_density(np.array([0.0, 0.01, 0.02, 1.0, 2.0, 2.03]), 4.0) == pytest.approx(3 / 4)


def readme_counts() -> dict[str, list[int]]:
    """The table of `data/README.md`: collection -> its numbers."""
    text = (Path(__file__).parents[1] / "data/README.md").read_text()
    return counts_of(text.split(BEGIN)[1].split(END)[0])


def counts_of(table: str) -> dict[str, list[int]]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
    return {row[0]: [int(cell.replace(",", "")) for cell in row[1:]] for row in rows[2:]}


def test_the_readme_counts_every_score_there_is() -> None:
    counted = readme_counts()
    for name in COLLECTIONS:
        pieces, left_out = counted[name][:2]
        assert pieces + left_out == len(corpus_files((name,))), name
    together = [counted[name] for name in COLLECTIONS]
    assert [sum(column) for column in zip(*together, strict=True)] == counted["all"]


@pytest.mark.slow
def test_the_readme_table_is_what_the_scores_give(cache: Path) -> None:
    """For the small collections: all scores together take minutes to parse."""
    small = ("ciconia", "corelli", "cpebach", "luca", "lusitano", "monteverdi", "schumann_robert")
    shelf = Shelf(small, cache, 2)
    table = counts_table(shelf.pieces(shelf.ids), list(shelf.rejected), small)
    found, stated = counts_of(table), readme_counts()
    assert found.pop("all")[0] == sum(found[name][0] for name in small)
    assert found == {name: stated[name] for name in small}
