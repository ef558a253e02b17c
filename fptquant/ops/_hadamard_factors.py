"""The Hadamard matrices that sizes are made of, H_n = H_a (x) H_b (x) ... (x) H_2, constructed and verified."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fptquant.errors import UserError

LARGEST_FACTOR = 1024


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, e) with q = p^e, or None."""
    for p in range(2, q + 1):
        if q % p == 0:
            e = 0
            while q % p == 0:
                q, e = q // p, e + 1
            return (p, e) if q == 1 else None
    return None


def _powers_of_generator(p: int, e: int) -> list[int]:
    """1, x, x^2, ... of GF(p^e) as base-p digits, for the first polynomial of degree e that makes x a generator."""
    q = p**e
    for tail in range(q):
        low = [tail // p**k % p for k in range(e)]
        element, powers = [1] + [0] * (e - 1), []
        for _ in range(q - 1):
            powers.append(sum(digit * p**k for k, digit in enumerate(element)))
            top = element[-1]
            element = [((element[k - 1] if k else 0) - top * low[k]) % p for k in range(e)]
            if element == [1] + [0] * (e - 1):
                break
        if len(powers) == q - 1 and len(set(powers)) == q - 1 and 0 not in powers:
            return powers
    raise AssertionError("every finite field has a generator")


def _jacobsthal(p: int, e: int) -> Tensor:
    """Q[i, j] = chi(i - j), the quadratic character of GF(p^e)."""
    q = p**e
    character = torch.zeros(q, dtype=torch.int64)
    for k, element in enumerate(_powers_of_generator(p, e)):
        character[element] = 1 if k % 2 == 0 else -1
    index = torch.arange(q)
    difference = torch.zeros(q, q, dtype=torch.int64)
    for k in range(e):
        digit = index // p**k % p
        difference += (digit[:, None] - digit[None, :]) % p * p**k
    return character[difference]


@cache
def _construct(size: int) -> Tensor | None:
    if size in (1, 2):
        return torch.tensor([[1, 1], [1, -1]])[:size, :size]
    for q, residue in ((size - 1, 3), (size // 2 - 1, 1)):
        base = _prime_power(q) if q > 2 and q % 4 == residue and size % 4 == 0 else None
        if base is None:
            continue
        border = torch.ones(q + 1, q + 1, dtype=torch.int64)
        border[0, 0] = 0
        border[1:, 1:] = _jacobsthal(*base)
        identity = torch.eye(q + 1, dtype=torch.int64)
        if residue == 3:
            border[1:, 0] = -1
            matrix = identity + border
        else:
            matrix = torch.kron(border, torch.tensor([[1, 1], [1, -1]])) + torch.kron(
                identity, torch.tensor([[1, -1], [-1, -1]])
            )
        assert torch.equal(matrix @ matrix.t(), size * torch.eye(size, dtype=torch.int64))
        return matrix
    return None


@cache
def _best(odd: int, power: int) -> tuple[int, ...] | None:
    """Factors whose odd parts multiply to ``odd`` and whose powers of two are at most 2^power, of the least sum."""
    if odd == 1:
        return ()
    found: list[tuple[int, ...]] = []
    for part in (d for d in range(3, odd + 1, 2) if odd % d == 0):
        for used in range(2, power + 1):
            if part << used > LARGEST_FACTOR:
                break
            rest = _best(odd // part, power - used)
            if rest is not None and _construct(part << used) is not None:
                found.append((part << used, *rest))
                break
    return min(found, key=sum, default=None)


def _split(n: int) -> tuple[tuple[int, ...], int] | None:
    power = (n & -n).bit_length() - 1
    factors = _best(n >> power, power)
    if factors is None:
        return None
    for factor in factors:
        power -= (factor & -factor).bit_length() - 1
    return factors, power


@cache
def factorize(n: int) -> tuple[tuple[int, ...], int]:
    """(factors, k) with H_n the Kronecker product of the factors' matrices and H_2^k, the last index fastest.

    Raises:
        UserError: if no Hadamard matrix of size n can be constructed; names the nearest sizes and the possible blocks.
    """
    split = _split(n) if n >= 1 else None
    if split is None:
        blocks = [d for d in range(2, n) if n % d == 0 and _split(d) is not None][-6:] if n >= 1 else []
        near = [
            next((m for m in range(n, 0, -1) if _split(m)), None),
            next(m for m in range(max(n, 1), 2 * max(n, 1) + 1) if _split(m)),
        ]
        sizes = " and ".join(str(m) for m in near if m is not None)
        remedy = f"; block sizes that divide {n}: {', '.join(map(str, blocks))}" if blocks else ""
        raise UserError(
            f"no Hadamard matrix of size {n} can be constructed: the nearest possible sizes are {sizes}{remedy}"
        )
    return split


def factor_matrix(size: int) -> Tensor:
    """The +-1 matrix of one factor (int64)."""
    matrix = _construct(size)
    if matrix is None:
        raise UserError(f"{size} is no factor of a Hadamard matrix")
    return matrix


def sizes_up_to(limit: int) -> list[int]:
    """All n <= limit that ``factorize`` can serve."""
    return [n for n in range(1, limit + 1) if _split(n) is not None]
