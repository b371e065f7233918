"""Rating blocks: grouping, binary form, chunks."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn_spark.core.blocks import (
    RatingBlock,
    chunk_numbers,
    concatenate,
    distinct,
    ranges,
    scatter,
    split_into_chunks,
)

entries = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 30), st.floats(-5, 5, width=32)), max_size=200
)


def block_of(triples):
    rows, others, values = (list(column) for column in zip(*triples, strict=True))
    return RatingBlock.from_entries(
        np.array(rows, np.int32), np.array(others, np.int32), np.array(values, np.float32)
    )


def triples_of(block):
    return sorted(
        zip(block.entry_rows().tolist(), block.others.tolist(), block.values.tolist(), strict=True)
    )


@given(entries.filter(bool))
def test_grouping_keeps_every_entry_and_orders_them(triples):
    block = block_of(triples)
    assert triples_of(block) == sorted(triples)
    assert (np.diff(block.slots) > 0).all()
    for first, last in zip(block.indptr, block.indptr[1:], strict=False):
        assert (np.diff(block.others[first:last]) >= 0).all()


@given(entries.filter(bool), st.randoms())
def test_grouping_does_not_depend_on_the_order_of_arrival(triples, random):
    shuffled = list(triples)
    random.shuffle(shuffled)
    first, second = block_of(triples), block_of(shuffled)
    np.testing.assert_array_equal(first.others, second.others)
    np.testing.assert_array_equal(first.values, second.values)


@given(entries.filter(bool))
def test_binary_form_round_trips(triples):
    block = block_of(triples)
    again = RatingBlock.from_binary(block.to_binary())
    for name in ("slots", "indptr", "others", "values"):
        np.testing.assert_array_equal(getattr(block, name), getattr(again, name))


@given(entries.filter(bool), entries)
def test_without_drops_exactly_the_named_pairs(triples, dropped):
    pairs = {(row, other) for row, other, _ in dropped}
    rows = np.array([row for row, _ in pairs], np.int32)
    others = np.array([other for _, other in pairs], np.int32)
    left = block_of(triples).without(rows, others)
    assert triples_of(left) == sorted(t for t in triples if (t[0], t[1]) not in pairs)
    assert (left.counts > 0).all()


@settings(max_examples=50)
@given(entries.filter(bool), st.integers(1, 4), st.integers(1, 50))
def test_chunks_are_within_one_block_and_join_to_the_whole(triples, n_blocks, size):
    block = block_of(triples)
    numbers = dict(
        zip(
            block.slots.tolist(),
            chunk_numbers(block.slots, block.counts, n_blocks, size).tolist(),
            strict=True,
        )
    )
    chunks = list(split_into_chunks(block, n_blocks, size))
    for number, chunk, part in chunks:
        assert set((part.slots % n_blocks).tolist()) == {number}
        assert chunk % n_blocks == number
        assert {numbers[slot] for slot in part.slots.tolist()} == {chunk}
    assert triples_of(concatenate([part for _, _, part in chunks])) == triples_of(block)


@given(entries.filter(bool), st.integers(1, 50), st.randoms())
def test_pieces_hold_whole_rows_and_join_to_the_block_in_any_order(triples, most, random):
    block = block_of(triples)
    pieces = list(block.pieces(most))
    largest = int(block.counts.max())
    assert all(piece.n_ratings < most + largest for piece in pieces)
    assert [slot for piece in pieces for slot in piece.slots] == block.slots.tolist()
    rows = [{name: bytes(value) for name, value in piece.to_binary().items()} for piece in pieces]
    random.shuffle(rows)
    joined = RatingBlock.from_pieces(rows)
    for name in ("slots", "indptr", "others", "values"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(block, name))


@given(entries.filter(bool), st.integers(1, 50), st.randoms())
def test_loose_ratings_join_to_the_block_in_any_order(triples, most, random):
    block = block_of(triples)
    random.shuffle(triples)
    rows = []
    for start in range(0, len(triples), most):
        slots, others, values = zip(*triples[start : start + most], strict=True)
        rows.append(
            {
                "slots": np.array(slots, np.int32).tobytes(),
                "counts": None,
                "others": np.array(others, np.int32).tobytes(),
                "values": np.array(values, np.float32).tobytes(),
            }
        )
    joined = RatingBlock.from_pieces(rows)
    for name in ("slots", "indptr", "others", "values"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(block, name))


@given(entries.filter(bool), st.randoms())
def test_repeated_pairs_are_ordered_by_value(triples, random):
    twice = [*triples, *[(row, other, value + 1) for row, other, value in triples]]
    random.shuffle(twice)
    block = block_of(twice)
    for first, last in zip(block.indptr, block.indptr[1:], strict=False):
        pairs = list(zip(block.others[first:last], block.values[first:last], strict=True))
        assert pairs == sorted(pairs)


def test_a_block_without_rows_is_one_piece():
    assert [piece.n_rows for piece in concatenate([]).pieces()] == [0]


def test_ranges_lists_the_integers_of_each():
    np.testing.assert_array_equal(ranges(np.array([3, 7, 7]), np.array([5, 7, 9])), [3, 4, 7, 8])
    assert len(ranges(np.zeros(0, np.int64), np.zeros(0, np.int64))) == 0


def test_scatter_places_rows_and_leaves_zeros():
    dense = scatter(np.array([2, 0], np.int32), np.array([[1, 2], [3, 4]], np.float32), 4)
    np.testing.assert_array_equal(dense, [[3, 4], [0, 0], [1, 2], [0, 0]])


@given(st.lists(st.integers(0, 2**31 - 1) | st.integers(0, 50)))
def test_distinct_slots_are_those_of_unique(slots):
    array = np.array(slots, np.int32)
    found = distinct(array)
    np.testing.assert_array_equal(found, np.unique(array))
    assert found.dtype == np.int32
