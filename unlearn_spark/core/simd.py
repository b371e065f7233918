"""The numba engine: Gram matrices and Cholesky factors at the speed of the vector units.

LAPACK solves one small system at a time, and slowly: a 64 x 64 factorisation is too short to fill a
pipeline. Here as many rows as a vector register has lanes (16 in float32 with AVX-512) are
factorised *together*: every scalar of the textbook algorithm becomes a vector with one entry for
each row, and no lane ever waits for another.

    ratings of a row -- gather --> M (slices that fit the first-level cache)
                     -- Gram ----> A of that row, row-major      (staged, one for each lane)
    a lane for each row -- transpose --> A[i][p][lane]
                     -- factorise, substitute --> x[i][lane]

The loops that must keep their accumulators in registers (Gram tile, Cholesky tile) are emitted as
LLVM vector code, because no auto-vectoriser finds them; the rest is plain numba. Rows that cannot
be solved well here go back to `unlearn_spark.core.kernel`, which solves them in float64.

One thread a call: Spark runs a worker for each core, the embedded engine a call on each.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from unlearn_spark.core.objective import DUAL_ERROR, SCRATCH_BYTES, safe_range

if TYPE_CHECKING:
    from unlearn_spark.core.objective import _Found, _Problem

_AVX512 = bool(llvmlite.binding.get_host_cpu_features().get("avx512f", False))
LANE_BYTES = 64 if _AVX512 else 32
"""Width of a vector. The tiles below fill the 32 (AVX-512) or 16 registers."""
TILE = 4 if _AVX512 else 2
"""Cholesky tiles are TILE x TILE vectors."""
GRAM_ROWS = 8 if _AVX512 else 4
"""Gram tiles are GRAM_ROWS x (1 to 3) vectors."""
SLICE_BYTES = 24 << 10
"""Bytes of factors gathered at a time: most of a first-level cache."""
FLUSH = 1024
"""Ratings whose products are summed in the working precision before they go to a float64 sum."""

NORMAL, ZERO, UNSOLVED = 0, 1, 2

# No `nnan` or `ninf`: an overflow must stay visible.
_FASTMATH = {"reassoc", "contract", "nsz", "arcp"}
_jit = njit(cache=True, nogil=True, fastmath=_FASTMATH, error_model="numpy")


# --- vector code ----------------------------------------------------------------------------------


class _Vectors:
    """Emits loads, stores and arithmetic on vectors of one element type."""

    def __init__(self, builder: Any, element: Any) -> None:
        self.builder = builder
        self.scalar = ir.FloatType() if element == types.float32 else ir.DoubleType()
        self.itemsize = 4 if element == types.float32 else 8
        self.lanes = LANE_BYTES // self.itemsize
        self.type = ir.VectorType(self.scalar, self.lanes)
        self.suffix = f"v{self.lanes}f{8 * self.itemsize}"

    def pointer(self, address: Any, *, scalar: bool = False) -> Any:
        kind = self.scalar if scalar else self.type
        return self.builder.inttoptr(address, kind.as_pointer())

    def load(self, base: Any, index: Any) -> Any:
        return self.builder.load(self.builder.gep(base, [index]), align=LANE_BYTES)

    def store(self, value: Any, base: Any, index: Any) -> None:
        self.builder.store(value, self.builder.gep(base, [index]), align=LANE_BYTES)

    def broadcast(self, base: Any, index: Any) -> Any:
        value = self.builder.load(self.builder.gep(base, [index]), align=self.itemsize)
        return self.splat(value)

    def splat(self, value: Any) -> Any:
        empty = ir.Constant(self.type, ir.Undefined)
        one = self.builder.insert_element(empty, value, ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(one, empty, zeros)

    def _call(self, name: str, *arguments: Any) -> Any:
        signature = ir.FunctionType(self.type, [self.type] * len(arguments))
        function = cgutils.get_or_insert_function(
            self.builder.module, signature, f"llvm.{name}.{self.suffix}"
        )
        return self.builder.call(function, arguments)

    def add_product(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c"""
        return self._call("fma", a, b, c)

    def subtract_product(self, a: Any, b: Any, c: Any) -> Any:
        """c - a * b"""
        return self._call("fma", self.builder.fneg(a), b, c)

    def reciprocal_root(self, a: Any) -> Any:
        one = self.splat(ir.Constant(self.scalar, 1.0))
        return self.builder.fdiv(one, self._call("sqrt", a))

    def variables(self, values: list[Any]) -> list[Any]:
        """Stack slots that LLVM keeps in registers."""
        slots = []
        for value in values:
            slot = cgutils.alloca_once(self.builder, self.type)
            self.builder.store(value, slot)
            slots.append(slot)
        return slots


def _plus(builder: Any, a: Any, constant: int) -> Any:
    return builder.add(a, ir.Constant(a.type, constant))


def _gram_tile(rows: int, vectors: int) -> Any:
    """Make ``out[r, v] += sum_t left[t, r] * right[t, v]`` for a tile of rows x vectors.

    Arguments: a scalar of the element type; the address and the stride of `out`, `left` and
    `right`, strides in elements; the number of terms.
    """

    @intrinsic
    def tile(  # type: ignore[no-untyped-def]
        typingctx, proto, out, out_stride, left, left_stride, right, right_stride, terms
    ):
        def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            _, out, out_stride, left, left_stride, right, right_stride, terms = arguments
            emit = _Vectors(builder, signature.args[0])
            lanes = ir.Constant(out_stride.type, emit.lanes)
            out_vectors = builder.sdiv(out_stride, lanes)
            right_vectors = builder.sdiv(right_stride, lanes)
            target, source = emit.pointer(out), emit.pointer(right)
            factors = emit.pointer(left, scalar=True)
            places = [
                _plus(builder, builder.mul(ir.Constant(out.type, r), out_vectors), v)
                for r in range(rows)
                for v in range(vectors)
            ]
            sums = emit.variables([emit.load(target, place) for place in places])
            with cgutils.for_range(builder, terms) as loop:
                at = builder.mul(loop.index, right_vectors)
                terms_of = [emit.load(source, _plus(builder, at, v)) for v in range(vectors)]
                at = builder.mul(loop.index, left_stride)
                for r in range(rows):
                    factor = emit.broadcast(factors, _plus(builder, at, r))
                    for v in range(vectors):
                        slot = sums[r * vectors + v]
                        total = emit.add_product(factor, terms_of[v], builder.load(slot))
                        builder.store(total, slot)
            for place, slot in zip(places, sums, strict=True):
                emit.store(builder.load(slot), target, place)
            return context.get_dummy_value()

        return types.void(proto, *[types.intp] * 7), codegen

    return tile


def _cholesky_tile(rows: int, *, diagonal: bool) -> Any:
    """Make one left-looking step of L for the tile at (i, j), in every lane.

    ``C = A[i:i+rows, j:j+TILE] - L[i:, :j] L[j:, :j]'``; then C's own Cholesky factor where the
    tile is `diagonal`, else ``C L[j:j+TILE, j:j+TILE]'^-1``. In place.

    Arguments: a scalar of the element type; the addresses of L and of the reciprocals of its
    diagonal; L's row stride in vectors; i; j.
    """

    @intrinsic
    def tile(typingctx, proto, matrix, reciprocals, stride, i, j):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            _, matrix, reciprocals, stride, i, j = arguments
            emit = _Vectors(builder, signature.args[0])
            L, inverse = emit.pointer(matrix), emit.pointer(reciprocals)
            left = [builder.mul(_plus(builder, i, a), stride) for a in range(rows)]
            top = [builder.mul(_plus(builder, j, b), stride) for b in range(TILE)]
            wanted = [(a, b) for a in range(rows) for b in range(TILE) if not diagonal or b <= a]
            place = {(a, b): builder.add(left[a], _plus(builder, j, b)) for a, b in wanted}
            slots = emit.variables([emit.load(L, place[key]) for key in wanted])
            with cgutils.for_range(builder, j) as loop:
                across = [emit.load(L, builder.add(at, loop.index)) for at in top]
                down = across
                if not diagonal:
                    down = [emit.load(L, builder.add(at, loop.index)) for at in left]
                for (a, b), slot in zip(wanted, slots, strict=True):
                    rest = emit.subtract_product(down[a], across[b], builder.load(slot))
                    builder.store(rest, slot)
            C = {key: builder.load(slot) for key, slot in zip(wanted, slots, strict=True)}
            for b in range(TILE):  # right-looking inside the tile
                at = _plus(builder, j, b)
                if diagonal:
                    pivot = emit.reciprocal_root(C[b, b])
                    emit.store(pivot, inverse, at)
                else:
                    pivot = emit.load(inverse, at)
                for a in range(b if diagonal else 0, rows):
                    C[a, b] = builder.fmul(C[a, b], pivot)
                for c in range(b + 1, TILE):
                    known = C[c, b] if diagonal else emit.load(L, builder.add(top[c], at))
                    for a in range(c if diagonal else 0, rows):
                        C[a, c] = emit.subtract_product(C[a, b], known, C[a, c])
            for key in wanted:
                emit.store(C[key], L, place[key])
            return context.get_dummy_value()

        return types.void(proto, *[types.intp] * 5), codegen

    return tile


@intrinsic
def _substitute_back(typingctx, proto, matrix, reciprocals, stride, dim):  # type: ignore[no-untyped-def]
    """Overwrite y = L^-1 b, row `dim` of L's array, by x = L'^-1 y in every lane."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, matrix, reciprocals, stride, dim = arguments
        emit = _Vectors(builder, signature.args[0])
        L, inverse = emit.pointer(matrix), emit.pointer(reciprocals)
        y = builder.mul(dim, stride)
        with cgutils.for_range(builder, dim) as loop:
            i = _plus(builder, builder.sub(dim, loop.index), -1)
            x = builder.fmul(emit.load(L, builder.add(y, i)), emit.load(inverse, i))
            emit.store(x, L, builder.add(y, i))
            row = builder.mul(i, stride)
            with cgutils.for_range(builder, i) as inner:
                at = builder.add(y, inner.index)
                factor = emit.load(L, builder.add(row, inner.index))
                emit.store(emit.subtract_product(factor, x, emit.load(L, at)), L, at)
        return context.get_dummy_value()

    return types.void(proto, *[types.intp] * 4), codegen


@intrinsic
def _transpose(typingctx, proto, source, stride, target):  # type: ignore[no-untyped-def]
    """A square of lanes x lanes elements: ``target[c][l] = source[l][c]``; stride in vectors."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, source, stride, target = arguments
        emit = _Vectors(builder, signature.args[0])
        lanes = emit.lanes
        src, dst = emit.pointer(source), emit.pointer(target)
        v = [
            emit.load(src, builder.mul(ir.Constant(stride.type, lane), stride))
            for lane in range(lanes)
        ]
        mask = ir.VectorType(ir.IntType(32), lanes)
        half = lanes // 2
        while half:  # exchange the off-diagonal quarters, in ever smaller squares
            low = [c if not c & half else lanes + c - half for c in range(lanes)]
            high = [c + half if not c & half else lanes + c for c in range(lanes)]
            for r in range(lanes):
                if not r & half:
                    a, b = v[r], v[r + half]
                    v[r] = builder.shuffle_vector(a, b, ir.Constant(mask, low))
                    v[r + half] = builder.shuffle_vector(a, b, ir.Constant(mask, high))
            half //= 2
        for c in range(lanes):
            emit.store(v[c], dst, ir.Constant(stride.type, c))
        return context.get_dummy_value()

    return types.void(proto, *[types.intp] * 3), codegen


_gram_1 = _gram_tile(GRAM_ROWS, 1)
_gram_2 = _gram_tile(GRAM_ROWS, 2)
_gram_3 = _gram_tile(GRAM_ROWS, 3)
_pair_1 = _gram_tile(2, 1)
_diagonal_tile = _cholesky_tile(TILE, diagonal=True)
_panel_tile = _cholesky_tile(TILE, diagonal=False)
_panel_row = _cholesky_tile(1, diagonal=False)


# --- one row --------------------------------------------------------------------------------------


@_jit
def _add_gram(zero, dim, M, terms, A):  # type: ignore[no-untyped-def]
    """``A += M[:terms]' M[:terms]``, the lower triangle of its leading `dim` rows."""
    size = A.itemsize
    lanes = LANE_BYTES // size
    source, stride, target, width = M.ctypes.data, M.shape[1], A.ctypes.data, A.shape[1]
    for row in range(0, dim, GRAM_ROWS):
        n_vectors = (row + GRAM_ROWS - 1) // lanes + 1
        left = source + row * size
        v = 0
        while v < n_vectors:
            rest = n_vectors - v
            out = target + (row * width + v * lanes) * size
            right = source + v * LANE_BYTES
            if rest == 3 or rest > 4:
                _gram_3(zero, out, width, left, stride, right, stride, terms)
                v += 3
            elif rest > 1:
                _gram_2(zero, out, width, left, stride, right, stride, terms)
                v += 2
            else:
                _gram_1(zero, out, width, left, stride, right, stride, terms)
                v += 1


@_jit
def _finish_row(A, n, ridge, right, b, low, high, dim):  # type: ignore[no-untyped-def]
    """Add the ridge, pad with the identity, copy b; return A's largest diagonal entry, or -1 if a
    magnitude is out of range."""
    largest = A[0, 0] * 0
    for i in range(n):
        A[i, i] += ridge
        largest = max(largest, A[i, i])
    for i in range(n, dim):
        A[i, :] = 0
        A[i, i] = 1
    size = 0.0
    for i in range(n):
        right[i] = b[i]
        size = max(size, abs(b[i]))
    right[n:] = 0
    if low < largest < high and low < size < high:
        return float(largest)
    return -1.0


@_jit
def _report(g, b, q, norms, at, rank):  # type: ignore[no-untyped-def]
    """Write ||g||, ||b|| and q of one row; return False if ||g|| or q overflowed."""
    gg, bb = 0.0, 0.0
    for j in range(rank):
        gg += g[j] * g[j]
        bb += b[j] * b[j]
    norms[at, 0], norms[at, 1], norms[at, 2] = np.sqrt(gg), np.sqrt(bb), q
    return np.isfinite(norms[at, 0]) and np.isfinite(q)


@_jit
def _factorise(zero, stage, stage_stride, width, right, L, inverse, dim):  # type: ignore[no-untyped-def]
    """Solve the staged systems of all lanes; x is left in row `dim` of L."""
    size = L.itemsize
    lanes = LANE_BYTES // size
    matrix, reciprocals, stride = L.ctypes.data, inverse.ctypes.data, L.shape[1]
    for i in range(dim):
        for v in range(0, i + 1, lanes):
            _transpose(
                zero,
                stage.ctypes.data + (i * width + v) * size,
                stage_stride // lanes,
                matrix + (i * stride + v) * LANE_BYTES,
            )
    for v in range(0, dim, lanes):
        _transpose(
            zero,
            right.ctypes.data + v * size,
            right.shape[1] // lanes,
            matrix + (dim * stride + v) * LANE_BYTES,
        )
    for j in range(0, dim, TILE):
        _diagonal_tile(zero, matrix, reciprocals, stride, j, j)
        for i in range(j + TILE, dim, TILE):
            _panel_tile(zero, matrix, reciprocals, stride, i, j)
        _panel_row(zero, matrix, reciprocals, stride, dim, j)
    _substitute_back(zero, matrix, reciprocals, stride, dim)


@_jit
def _lane_is_sound(L, inverse, dim, lane, n, tolerance):  # type: ignore[no-untyped-def]
    """Whether every pivot is above rounding noise and the answer finite."""
    for i in range(n):
        r = inverse[i, lane]
        if not (r * r * tolerance < 1) or not np.isfinite(L[dim, i, lane]):
            return False
    return True


@_jit
def _residuals(  # type: ignore[no-untyped-def]
    indptr, indices, values, other, factors, implicit, alpha, reg_param, first, gathered, gradient,
    b,
):  # fmt: skip
    """Fill `gradient` (without Y'Y) and `b` of the rows from `first` on, in float64."""
    rank = other.shape[1]
    step = gathered.shape[0]
    x, g, target = np.zeros(rank), np.zeros(rank), np.zeros(rank)
    for at in range(gradient.shape[0]):
        row = first + at
        counted = 0
        for j in range(rank):
            x[j] = factors[row, j]
            g[j] = target[j] = 0.0
        for start in range(indptr[row], indptr[row + 1], step):
            n = min(step, indptr[row + 1] - start)
            # Copied before use: the loads of many rows wait for memory at the same time.
            for t in range(n):
                source = indices[start + t]
                for j in range(rank):
                    gathered[t, j] = other[source, j]
            for t in range(n):
                v = np.float64(values[start + t])
                c, d = 1.0, v
                if implicit:
                    c = alpha * abs(v)
                    d = 1 + c if v > 0 else 0.0
                counted += 1 if not implicit or v > 0 else 0
                fitted = 0.0
                for j in range(rank):
                    fitted += np.float64(gathered[t, j]) * x[j]
                error = c * fitted - d
                for j in range(rank):
                    y = np.float64(gathered[t, j])
                    g[j] += error * y
                    target[j] += d * y
        for j in range(rank):
            gradient[at, j] = g[j] + reg_param * counted * x[j]
            b[at, j] = target[j]


# --- batches of rows ------------------------------------------------------------------------------


@_jit
def _solve_primal(  # type: ignore[no-untyped-def]
    zero, eps, low, high, indptr, indices, values, other, implicit, alpha, reg_param, gram,
    warm, pulls, rows, M, pair, products, stage, right, L, inverse, factors, norms, state,
):  # fmt: skip
    """Solve rows by k x k systems; write `norms` (len(rows), 3) and `state` (len(rows),)."""
    rank = other.shape[1]
    width = M.shape[1]
    step = M.shape[0]
    lanes = LANE_BYTES // M.itemsize
    dim = (rank + TILE - 1) // TILE * TILE
    stage_stride = stage.shape[1]
    with_warm = warm.shape[0] > 0
    w = np.zeros(width, M.dtype)
    wide = np.zeros((rank, rank), np.float64)
    b, g = np.zeros(rank), np.zeros(rank)
    tolerances = np.zeros(lanes)
    M[:, rank:] = 0
    for first in range(0, len(rows), lanes):
        batch = min(lanes, len(rows) - first)
        for lane in range(lanes):
            A = stage[lane, : width * width].reshape(width, width)
            if lane >= batch:
                A[:dim] = 0
                for i in range(dim):
                    A[i, i] = 1
                right[lane, :] = 0
                continue
            at = first + lane
            row = rows[at]
            for i in range(width):  # numba compiles loops sooner than array assignments
                for j in range(width):
                    A[i, j] = gram[i, j]
            b[:] = 0
            g[:] = 0
            q = 0.0
            counted = 0
            wanted = False
            flushed = False
            unflushed = 0
            if with_warm:
                for j in range(rank):
                    w[j] = warm[row, j]
            for start in range(indptr[row], indptr[row + 1], step):
                n = min(step, indptr[row + 1] - start)
                for t in range(n):
                    source = indices[start + t]
                    for p in range(rank):
                        M[t, p] = other[source, p]
                for t in range(n):
                    v = zero + values[start + t]
                    c = zero + 1
                    d = v
                    if implicit:
                        c = zero + alpha * abs(v)
                        d = 1 + c if v > 0 else zero
                    counted += 1 if not implicit or v > 0 else 0
                    wanted = wanted or d != 0
                    pair[t, 0] = d
                    pair[t, 2] = c
                    if with_warm:
                        s = zero
                        for p in range(width):
                            s += M[t, p] * w[p]
                        pair[t, 1] = c * s - d
                        q += np.float64(c * s - 2 * d) * np.float64(s)
                products[:, :] = 0
                for v0 in range(0, width, lanes):
                    _pair_1(
                        zero, products.ctypes.data + v0 * M.itemsize, width,
                        pair.ctypes.data, pair.shape[1],
                        M.ctypes.data + v0 * M.itemsize, width, n,
                    )  # fmt: skip
                for j in range(rank):
                    b[j] += products[0, j]
                    g[j] += products[1, j]
                if implicit:
                    for t in range(n):
                        root = np.sqrt(pair[t, 2])
                        for p in range(rank):
                            M[t, p] *= root
                _add_gram(zero, rank, M, n, A)
                unflushed += n
                if unflushed >= FLUSH and start + n < indptr[row + 1]:
                    if not flushed:
                        wide[:, :] = 0
                    flushed = True
                    unflushed = 0
                    for i in range(rank):
                        for j in range(i + 1):
                            wide[i, j] += A[i, j]
                    A[:, :] = 0
            if flushed:
                for i in range(rank):
                    for j in range(i + 1):
                        A[i, j] = wide[i, j] + A[i, j]
            ridge = reg_param * counted
            largest = _finish_row(A, rank, zero + ridge, right[lane], b, low, high, dim)
            tolerances[lane] = 2 * rank * eps * largest
            state[at] = ZERO if not wanted else (NORMAL if largest > 0 else UNSOLVED)
            if with_warm:
                for j in range(rank):
                    pull = ridge * np.float64(w[j])
                    if implicit:
                        pull += pulls[at, j]
                    g[j] += pull
                    q += pull * np.float64(w[j])
                if not _report(g, b, q, norms, at, rank):
                    state[at] = UNSOLVED
        _factorise(zero, stage, stage_stride, width, right, L, inverse, dim)
        for lane in range(batch):
            at = first + lane
            if state[at] == NORMAL:
                if _lane_is_sound(L, inverse, dim, lane, rank, tolerances[lane]):
                    for j in range(rank):
                        factors[rows[at], j] = L[dim, j, lane]
                else:
                    state[at] = UNSOLVED


@_jit
def _solve_dual(  # type: ignore[no-untyped-def]
    zero, eps, low, high, dual_error, indptr, indices, values, other, reg_param,
    warm, rows, gathered, stage, right, L, inverse, factors, norms, state,
):  # fmt: skip
    """Solve rows of n < rank ratings by n x n systems; rows come in ascending order of n."""
    rank = other.shape[1]
    lanes = LANE_BYTES // gathered.itemsize
    with_warm = warm.shape[0] > 0
    b, g = np.zeros(rank), np.zeros(rank)
    d = np.zeros(rank)
    error = np.zeros(rank, gathered.dtype)
    tolerances = np.zeros(lanes)
    for first in range(0, len(rows), lanes):
        batch = min(lanes, len(rows) - first)
        last = rows[first + batch - 1]
        most = indptr[last + 1] - indptr[last]
        dim = (most + TILE - 1) // TILE * TILE
        width = (most + lanes - 1) // lanes * lanes
        for lane in range(lanes):
            K = stage[lane, : width * width].reshape(width, width)
            K[:, :] = 0
            if lane >= batch:
                for i in range(dim):
                    K[i, i] = 1
                right[lane, :] = 0
                continue
            at = first + lane
            row = rows[at]
            start = indptr[row]
            n = indptr[row + 1] - start
            T = gathered[lane, : rank * width].reshape(rank, width)
            T[:, :] = 0
            wanted = False
            for t in range(n):
                source = indices[start + t]
                for j in range(rank):
                    T[j, t] = other[source, j]
                d[t] = values[start + t]
                wanted = wanted or d[t] != 0
            _add_gram(zero, n, T, rank, K)
            ridge = reg_param * n
            largest = _finish_row(K, n, zero + ridge, right[lane], d, low, high, dim)
            tolerances[lane] = 2 * n * eps * largest
            size = 0.0
            for j in range(rank):
                total = 0.0
                for t in range(n):
                    total += np.float64(T[j, t]) * d[t]
                b[j] = total
                size = max(size, abs(total))
            state[at] = ZERO if not wanted else UNSOLVED
            if wanted and largest > 0 and low < size < high:
                state[at] = NORMAL
            if with_warm:
                error[:n] = 0
                for j in range(rank):
                    wj = zero + warm[row, j]
                    for t in range(n):
                        error[t] += T[j, t] * wj
                q = 0.0
                for t in range(n):
                    s = np.float64(error[t])
                    q += (s - 2 * d[t]) * s
                    error[t] -= zero + d[t]
                for j in range(rank):
                    total = 0.0
                    for t in range(n):
                        total += np.float64(T[j, t]) * np.float64(error[t])
                    wj64 = np.float64(warm[row, j])
                    g[j] = total + ridge * wj64
                    q += ridge * wj64 * wj64
                if not _report(g, b, q, norms, at, rank):
                    state[at] = UNSOLVED
        _factorise(zero, stage, stage.shape[1], width, right, L, inverse, dim)
        for lane in range(batch):
            at = first + lane
            if state[at] != NORMAL:
                continue
            row = rows[at]
            n = indptr[row + 1] - indptr[row]
            if not _lane_is_sound(L, inverse, dim, lane, n, tolerances[lane]):
                state[at] = UNSOLVED
                continue
            T = gathered[lane, : rank * width].reshape(rank, width)
            start = indptr[row]
            answer, target = 0.0, 0.0
            for t in range(n):
                error[t] = L[dim, t, lane]
                answer += np.float64(error[t]) ** 2
                target += np.float64(values[start + t]) ** 2
            # An answer this large carries its own rounding into the row's residual.
            rounding = tolerances[lane] / (2 * n) * np.sqrt(answer)
            if not rounding <= dual_error * np.sqrt(target):
                state[at] = UNSOLVED
                continue
            for j in range(rank):
                total = zero
                for t in range(n):
                    total += T[j, t] * error[t]
                factors[row, j] = total
                if not np.isfinite(factors[row, j]):
                    state[at] = UNSOLVED


# --- entry ----------------------------------------------------------------------------------------


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeros that start at a multiple of the vector width."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.zeros(size + LANE_BYTES, np.uint8)
    start = -memory.ctypes.data % LANE_BYTES
    return memory[start : start + size].view(dtype).reshape(shape)


def residuals(
    problem: _Problem, first: int, gradient: NDArray[np.float64], b: NDArray[np.float64]
) -> None:
    """Fill ``A x - b`` (without ``Y'Y x``) and ``b`` of the rows from `first` on.

    x is the problem's warm row; `gradient` and `b` are float64 (rows, k).
    """
    objective, rank = problem.objective, problem.rank
    gathered = np.empty((max(8, SLICE_BYTES // (4 * rank)), rank), np.float32)
    _residuals(
        problem.indptr, problem.indices, problem.values, problem.other, problem.warm,
        objective.implicit_prefs, objective.alpha, objective.reg_param, first, gathered, gradient,
        b,
    )  # fmt: skip


def solve(
    problem: _Problem, found: _Found, rows: NDArray[np.int64], dtype: np.dtype[Any]
) -> NDArray[np.int64]:
    """Solve what `dtype` can solve; return the rows that need care.

    For all other rows `found` is filled in place, as by the kernel's own engine.
    """

    objective, rank = problem.objective, problem.rank
    lanes = LANE_BYTES // dtype.itemsize
    width = -(-rank // lanes) * lanes
    padded = max(width, -(-rank // GRAM_ROWS) * GRAM_ROWS)
    step = max(8, SLICE_BYTES // (width * dtype.itemsize))
    zero = dtype.type(0)
    low, high = safe_range(dtype)
    eps = float(np.finfo(dtype).eps)
    # One vector more than a square: strides of a power of two would share one cache set.
    stage = _aligned((lanes, padded * width + lanes), dtype)
    right = _aligned((lanes, width + lanes), dtype)
    L = _aligned((padded + 1, width + 1, lanes), dtype)
    inverse = _aligned((padded, lanes), dtype)
    no_rows = np.zeros((0, rank), np.float32)
    warm = no_rows if problem.warm is None else problem.warm
    unsolved: list[NDArray[np.int64]] = []

    def keep(part: NDArray[np.int64], norms: NDArray[Any], state: NDArray[Any]) -> None:
        found.gradient_norm[part], found.b_norm[part], found.quadratic[part] = norms.T
        unsolved.append(part[state == UNSOLVED])

    counts = np.diff(problem.indptr)[rows]
    dual = np.zeros(len(rows), bool)
    if problem.gram is None and objective.reg_param > 0:
        dual = (counts > 0) & (counts < rank)
    whole = rows[~dual]
    if len(whole):
        gram = np.zeros((width, width), dtype)
        if problem.gram is not None:
            with np.errstate(over="ignore"):
                gram[:rank, :rank] = problem.gram
        M, pair = _aligned((step, width), dtype), _aligned((step, 4), dtype)
        products = _aligned((2, width), dtype)
        turn = max(lanes, SCRATCH_BYTES // (8 * rank))
        for part in (whole[at : at + turn] for at in range(0, len(whole), turn)):
            pulls = np.zeros((0, rank))
            if problem.warm is not None and problem.gram is not None:
                pulls = problem.warm[part].astype(np.float64) @ problem.gram
            norms, state = np.zeros((len(part), 3)), np.zeros(len(part), np.uint8)
            _solve_primal(
                zero, eps, low, high, problem.indptr, problem.indices, problem.values,
                problem.other, objective.implicit_prefs, objective.alpha, objective.reg_param,
                gram, warm, pulls, part, M, pair, products, stage, right, L, inverse, found.factors,
                norms, state,
            )  # fmt: skip
            keep(part, norms, state)
    small = rows[dual]
    if len(small):
        small = small[np.argsort(counts[dual], kind="stable")]
        gathered = _aligned((lanes, rank * width + lanes), dtype)
        norms, state = np.zeros((len(small), 3)), np.zeros(len(small), np.uint8)
        _solve_dual(
            zero, eps, low, high, DUAL_ERROR, problem.indptr, problem.indices,
            problem.values, problem.other, objective.reg_param, warm, small, gathered, stage,
            right, L, inverse, found.factors, norms, state,
        )  # fmt: skip
        keep(small, norms, state)
    return np.sort(np.concatenate([np.empty(0, np.int64), *unsolved]))


def are_compiled() -> bool:
    """Whether numba's cache holds compiled kernels; one of them stands for all."""
    folder = _solve_primal.stats.cache_path
    return folder is not None and any(Path(folder).glob("simd._solve_primal-*.nbi"))
