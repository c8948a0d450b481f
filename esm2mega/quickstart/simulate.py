"""Simulates protein families: a seeded FASTA with structure that a language model can learn.

Every family starts from an ancestor drawn from natural residue frequencies. Subfamily ancestors and then
members descend from it by the LG substitution model with gamma-distributed rates per site, so that some
columns stay conserved and others drift, as in alignments of real families. Deletions of ancestral columns
make the members unequal in length; because they only ever remove columns, the true alignment of a family is
known and the UniRef-like clusters are computed exactly.

The LG exchangeabilities and residue frequencies are those of Le S. Q., Gascuel O. (2008), An improved general
amino acid replacement matrix, Mol. Biol. Evol. 25:1307-1320.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from esm2mega.errors import UserError
from esm2mega.files import refuse_compressed, replacing

RESIDUES = "ARNDCQEGHILKMFPSTWYV"
"""Gives the order of the rows and columns of the published LG table."""

LG_FREQUENCIES = np.array(
    [0.079066, 0.055941, 0.041977, 0.053052, 0.012937, 0.040767, 0.071586, 0.057337, 0.022355, 0.062157]
    + [0.099081, 0.064600, 0.022951, 0.042302, 0.044040, 0.061197, 0.053287, 0.012066, 0.034155, 0.069147]
)

# Lower triangle of the symmetric LG exchangeabilities: row i (from the second residue on), columns 0 to i-1.
LG_EXCHANGEABILITIES = """
0.425093
0.276818 0.751878
0.395144 0.123954 5.076149
2.489084 0.534551 0.528768 0.062556
0.969894 2.807908 1.695752 0.523386 0.084808
1.038545 0.363970 0.541712 5.243870 0.003499 4.128591
2.066040 0.390192 1.437645 0.844926 0.569265 0.267959 0.348847
0.358858 2.426601 4.509238 0.927114 0.640543 4.813505 0.423881 0.311484
0.149830 0.126991 0.191503 0.010690 0.320627 0.072854 0.044265 0.008705 0.108882
0.395337 0.301848 0.068427 0.015076 0.594007 0.582457 0.069673 0.044261 0.366317 4.145067
0.536518 6.326067 2.145078 0.282959 0.013266 3.234294 1.807177 0.296636 0.697264 0.159069 0.137500
1.124035 0.484133 0.371004 0.025548 0.893680 1.672569 0.173735 0.139538 0.442472 4.273607 6.312358 0.656604
0.253701 0.052722 0.089525 0.017416 1.105251 0.035855 0.018811 0.089586 0.682139 1.112727 2.592692 0.023918
 1.798853
1.177651 0.332533 0.161787 0.394456 0.075382 0.624294 0.419409 0.196961 0.508851 0.078281 0.249060 0.390322
 0.099849 0.094464
4.727182 0.858151 4.008358 1.240275 2.784478 1.223828 0.611973 1.739990 0.990012 0.064105 0.182287 0.748683
 0.346960 0.361819 1.338132
2.139501 0.578987 2.000679 0.425860 1.143480 1.080136 0.604545 0.129836 0.584262 1.033739 0.302936 1.136863
 2.020366 0.165001 0.571468 6.472279
0.180717 0.593607 0.045376 0.029890 0.670128 0.236199 0.077852 0.268491 0.597054 0.111660 0.619632 0.049906
 0.696175 2.457121 0.095131 0.248862 0.140825
0.218959 0.314440 0.612025 0.135107 1.165532 0.257336 0.120037 0.054679 5.306834 0.232523 0.299648 0.131932
 0.481306 7.803902 0.089613 0.400547 0.245841 3.151815
2.547870 0.170887 0.083688 0.037967 1.959291 0.210332 0.245034 0.076701 0.119013 10.649107 1.702745
 0.185202 1.898718 0.654683 0.296501 0.098369 2.188158 0.189510 0.249313
"""

# Codes beyond the 20 residues: X is an undetermined residue, U selenocysteine, a gap a deleted column.
CODE_X, CODE_U, GAP = 20, 21, 255
LETTERS = np.frombuffer((RESIDUES + "XU").encode(), dtype=np.uint8)
METHIONINE = RESIDUES.index("M")
CYSTEINE = RESIDUES.index("C")

Codes = NDArray[np.uint8]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class FamilySpec:
    """Says what a simulated family looks like.

    The default lengths follow reviewed UniProt entries: mean 361 and median 294 residues, which for a
    log-normal distribution means sigma = sqrt(2 ln(361 / 294)) = 0.64.
    """

    median_length: float = 294.0
    length_sigma: float = 0.64
    min_length: int = 30
    max_length: int = 2000
    min_identity: float = 0.75
    """Bounds from below the members' expected identity to the ancestor, uniform up to `max_identity`."""
    max_identity: float = 0.90
    gamma_shape: float = 0.6
    """Gives the shape of the rate distribution over sites; below 1 most sites are slow and a few are fast."""
    subfamilies: int = 4
    deletion_rate: float = 0.002
    """Gives the probability, per member and ancestral column, that a deletion starts there."""
    deletion_length: float = 2.5
    """Gives the mean number of columns of a deletion, which is geometrically distributed."""
    unknown_rate: float = 2e-4
    """Gives the probability that a residue is written as X."""
    selenocysteine_rate: float = 2e-3
    """Gives the probability that a cysteine is written as U."""


@dataclass(frozen=True)
class SimulatedSet:
    """Says what was written, and how similar the sequences turned out."""

    fasta: Path
    sequences: int
    residues: int
    families: int
    mean_identity: float
    """Averages the observed identity of members to their family ancestor, over the columns that both have."""
    uniref90_clusters: int
    uniref50_clusters: int


@dataclass(frozen=True)
class Family:
    """Holds one family in its true alignment."""

    ancestor: Codes
    """Holds the residue of the ancestor in each column, [columns]."""
    members: Codes
    """Holds the residues of the members, [members, columns], GAP where a column was deleted."""

    def identity_to_ancestor(self) -> Floats:
        """Return each member's identity to the ancestor over the columns that the member kept, [members]."""
        kept = self.members != GAP
        return ((self.members == self.ancestor) & kept).sum(axis=1) / kept.sum(axis=1)


class SubstitutionModel:
    """Runs LG as a continuous-time Markov chain; a branch length counts expected substitutions per site."""

    def __init__(self) -> None:
        """Decompose the rate matrix; LG is reversible, hence symmetric once scaled by sqrt(frequency)."""
        self.frequencies: Floats = LG_FREQUENCIES / LG_FREQUENCIES.sum()
        exchange = np.zeros((20, 20))
        exchange[np.tril_indices(20, -1)] = np.array(LG_EXCHANGEABILITIES.split(), dtype=np.float64)
        exchange += exchange.T
        rates = exchange * self.frequencies  # Q_ij = s_ij pi_j
        np.fill_diagonal(rates, -rates.sum(axis=1))
        rates /= -(self.frequencies * np.diag(rates)).sum()  # one expected substitution per unit of time
        root = np.sqrt(self.frequencies)
        symmetric = root[:, None] * rates / root
        self.eigenvalues, vectors = np.linalg.eigh((symmetric + symmetric.T) / 2)
        self.left: Floats = vectors / root[:, None]
        self.right: Floats = vectors * root[:, None]

    def transition(self, codes: Codes, times: Floats) -> Floats:
        """Return the distribution of each site's residue after its time: [sites], [sites] -> [sites, 20]."""
        decay = np.exp(np.outer(times, self.eigenvalues))
        # Rounding leaves tiny negative numbers at very short times.
        probabilities = np.maximum((self.left[codes] * decay) @ self.right.T, 0.0)
        return probabilities / probabilities.sum(axis=1, keepdims=True)

    def evolve(self, codes: Codes, times: Floats, rng: np.random.Generator) -> Codes:
        """Draw each site's residue after its own time, [sites]."""
        cumulative = np.cumsum(self.transition(codes, times), axis=1)
        drawn = (cumulative < rng.random((len(codes), 1))).sum(axis=1)
        return np.minimum(drawn, 19).astype(np.uint8)

    def time_for_identity(self, ancestor: Codes, rates: Floats, identities: Floats) -> Floats:
        """Return the branch lengths at which the expected identity to the ancestor is each of `identities`.

        Args:
            ancestor: Residues of the ancestor, [sites].
            rates: Relative rate of every site, [sites]; a site of rate 0 never changes.
            identities: Wanted identities, [members], each within (0, 1].

        Returns:
            Branch lengths, [members]; the longest one of the grid where an identity is out of reach.
        """
        grid = np.concatenate([[0.0], np.geomspace(1e-3, 20.0, 60)])
        # The diagonal of a site's transition matrix is sum_k weights[site, k] exp(eigenvalue_k rate time).
        weights = self.left[ancestor] * self.right[ancestor]
        expected = [
            float((weights * np.exp(np.outer(rates * time, self.eigenvalues))).sum(1).mean()) for time in grid
        ]
        return np.interp(-identities, -np.array(expected), grid)


def simulate_family(
    model: SubstitutionModel, members: int, spec: FamilySpec, rng: np.random.Generator
) -> Family:
    """Simulate one family along a two-level tree: ancestor, subfamily ancestors, members."""
    log_length = rng.normal(np.log(spec.median_length), spec.length_sigma)
    columns = int(np.clip(round(float(np.exp(log_length))), spec.min_length, spec.max_length))
    ancestor = rng.choice(20, size=columns, p=model.frequencies).astype(np.uint8)
    rates = rng.gamma(spec.gamma_shape, 1.0 / spec.gamma_shape, size=columns)
    ancestor[0], rates[0] = METHIONINE, 0.0  # translation starts at methionine

    targets = rng.uniform(spec.min_identity, spec.max_identity, size=members)
    total_times = model.time_for_identity(ancestor, rates, targets)
    # Half of the closest member's distance is shared within a subfamily, so that no branch is negative. The
    # chain has no memory, hence the two branches together have the expected identity of their sum.
    shared = total_times.min() / 2
    subfamily_ancestors = [model.evolve(ancestor, rates * shared, rng) for _ in range(spec.subfamilies)]
    rows = np.empty((members, columns), dtype=np.uint8)
    for member in range(members):
        parent = subfamily_ancestors[member % spec.subfamilies]
        row = model.evolve(parent, rates * (total_times[member] - shared), rng)
        rows[member] = _decorate(row, spec, rng)
    return Family(ancestor, rows)


def _decorate(row: Codes, spec: FamilySpec, rng: np.random.Generator) -> Codes:
    """Put selenocysteines, undetermined residues and deletions into one member; the first residue stays."""
    row[(row == CYSTEINE) & (rng.random(len(row)) < spec.selenocysteine_rate)] = CODE_U
    row[rng.random(len(row)) < spec.unknown_rate] = CODE_X
    for start in np.flatnonzero(rng.random(len(row)) < spec.deletion_rate):
        row[start : start + rng.geometric(1.0 / spec.deletion_length)] = GAP
    row[0] = METHIONINE
    return row


def greedy_clusters(members: Codes, threshold: float) -> list[list[int]]:
    """Cluster aligned members as UniRef does.

    The longest member comes first, and each member joins the first representative that is near enough.
    Identity is the number of identical columns over the length of the shorter (joining) sequence.

    Args:
        members: Residues, [members, columns], GAP where a column is missing.
        threshold: Smallest identity of a cluster's member to its representative.

    Returns:
        One list of member numbers per cluster, the representative first.
    """
    lengths = (members != GAP).sum(axis=1)
    clusters: list[list[int]] = []
    for member in np.argsort(-lengths, kind="stable"):
        row = members[member]
        representatives = members[[cluster[0] for cluster in clusters]]
        identity = ((representatives == row) & (row != GAP)).sum(axis=1) / lengths[member]
        near = np.flatnonzero(identity >= threshold)
        if len(near):
            clusters[near[0]].append(int(member))
        else:
            clusters.append([int(member)])
    return clusters


def simulate_families(
    out_fasta: str | Path,
    n_families: int = 60,
    members: int = 40,
    seed: int = 1234,
    spec: FamilySpec | None = None,
    clusters_dir: str | Path | None = None,
) -> SimulatedSet:
    """Write a FASTA of simulated families and, when asked, the same proteins as UniRef-like cluster files.

    Args:
        out_fasta: File to write with every member of every family; it must not exist.
        n_families: Number of unrelated families.
        members: Number of sequences per family.
        seed: Seed of all random numbers; the same seed gives the same bytes.
        spec: Shape of the families; None for the defaults.
        clusters_dir: Directory for `uf50.fasta`, `uf90.fasta` (one representative per cluster) and
            `mapping.tsv` (UniRef50 id, tab, comma-separated UniRef90 ids, one header line); None for none.

    Raises:
        UserError: A setting is out of range, or a file exists already.
    """
    spec = spec or FamilySpec()
    _check(n_families, members, spec)
    out_fasta = Path(out_fasta)
    cluster_files = {} if clusters_dir is None else {n: Path(clusters_dir, n) for n in CLUSTER_FILES}
    refuse_compressed(out_fasta)
    for path in (out_fasta, *cluster_files.values()):
        if path.exists():
            raise UserError(
                f"{path} exists; simulated data never overwrite a file: name another one or remove it"
            )

    model = SubstitutionModel()
    # One generator per family: a family does not depend on how many others there are.
    families = [
        simulate_family(model, members, spec, np.random.default_rng([seed, number]))
        for number in range(n_families)
    ]
    _write(out_fasta, _fasta_lines(families))
    clusters = [_Clusters.of(number, family) for number, family in enumerate(families)]
    if cluster_files:
        _write(cluster_files["uf90.fasta"], (line for c in clusters for line in c.uniref90_fasta()))
        _write(cluster_files["uf50.fasta"], (line for c in clusters for line in c.uniref50_fasta()))
        mapping = (line for c in clusters for line in c.mapping())
        _write(cluster_files["mapping.tsv"], ["uniref50_id\tuniref90_ids\n", *mapping])
    return SimulatedSet(
        fasta=out_fasta,
        sequences=n_families * members,
        residues=sum(int((family.members != GAP).sum()) for family in families),
        families=n_families,
        mean_identity=float(np.mean([family.identity_to_ancestor() for family in families])),
        uniref90_clusters=sum(len(c.uniref90) for c in clusters),
        uniref50_clusters=sum(len(c.uniref50) for c in clusters),
    )


CLUSTER_FILES = ("uf50.fasta", "uf90.fasta", "mapping.tsv")


@dataclass(frozen=True)
class _Clusters:
    """Holds the UniRef-like clusters of one family; families are unrelated, so no cluster spans two."""

    number: int
    family: Family
    uniref90: list[int]
    """Lists the member number of every UniRef90 representative."""
    uniref50: list[list[int]]
    """Lists for each UniRef50 cluster the representatives of its UniRef90 clusters, its own one first."""

    @classmethod
    def of(cls, number: int, family: Family) -> _Clusters:
        """Cluster the members at 90 %, and then the representatives at 50 %, as UniRef does."""
        uniref90 = [cluster[0] for cluster in greedy_clusters(family.members, 0.9)]
        nested = greedy_clusters(family.members[uniref90], 0.5)
        return cls(number, family, uniref90, [[uniref90[i] for i in cluster] for cluster in nested])

    def uniref90_fasta(self) -> Iterator[str]:
        for member in self.uniref90:
            yield _record(f"UniRef90_{_member_id(self.number, member)}", "", self.family.members[member])

    def uniref50_fasta(self) -> Iterator[str]:
        for cluster in self.uniref50:
            yield _record(
                f"UniRef50_{_member_id(self.number, cluster[0])}", "", self.family.members[cluster[0]]
            )

    def mapping(self) -> Iterator[str]:
        for cluster in self.uniref50:
            ids = ",".join(f"UniRef90_{_member_id(self.number, member)}" for member in cluster)
            yield f"UniRef50_{_member_id(self.number, cluster[0])}\t{ids}\n"


def _fasta_lines(families: list[Family]) -> Iterator[str]:
    for number, family in enumerate(families):
        identities = family.identity_to_ancestor()
        for member, row in enumerate(family.members):
            text = f" family={number + 1} identity={identities[member]:.3f}"
            yield _record(_member_id(number, member), text, row)


def _member_id(number: int, member: int) -> str:
    return f"SIM{number + 1:04d}_{member + 1:04d}"


def _record(name: str, text: str, row: Codes) -> str:
    sequence = LETTERS[row[row != GAP]].tobytes().decode()
    lines = [sequence[start : start + 60] for start in range(0, len(sequence), 60)]
    return f">{name}{text}\n" + "\n".join(lines) + "\n"


def _write(path: Path, lines: Iterable[str]) -> None:
    with (
        replacing(path, "free space or name another place") as partial,
        open(partial, "w", encoding="ascii", newline="\n") as handle,
    ):
        handle.writelines(lines)


def _check(n_families: int, members: int, spec: FamilySpec) -> None:
    rules = (
        (n_families >= 1, f"n_families={n_families} must be at least 1"),
        (members >= 1, f"members={members} must be at least 1"),
        (spec.subfamilies >= 1, f"subfamilies={spec.subfamilies} must be at least 1"),
        (
            2 <= spec.min_length <= spec.median_length <= spec.max_length,
            f"lengths must satisfy 2 <= min_length={spec.min_length} <= median_length={spec.median_length} "
            f"<= max_length={spec.max_length}",
        ),
        (
            0.1 <= spec.min_identity <= spec.max_identity <= 1,
            f"identities must satisfy 0.1 <= min_identity={spec.min_identity} "
            f"<= max_identity={spec.max_identity} <= 1",
        ),
        (spec.gamma_shape > 0, f"gamma_shape={spec.gamma_shape} must be positive"),
        (spec.deletion_length >= 1, f"deletion_length={spec.deletion_length} must be at least 1"),
    )
    for holds, message in rules:
        if not holds:
            raise UserError(message)


def main(arguments: list[str] | None = None) -> None:
    """Run the command `python -m esm2mega.quickstart.simulate OUT.fasta [--families N] [--members N] …`."""
    default = FamilySpec()
    parser = argparse.ArgumentParser(
        prog="python -m esm2mega.quickstart.simulate", description="Simulate protein families."
    )
    parser.add_argument("out", help="FASTA to write")
    parser.add_argument("--families", type=int, default=60)
    parser.add_argument("--members", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--median-length", type=float, default=default.median_length)
    parser.add_argument("--length-sigma", type=float, default=default.length_sigma)
    parser.add_argument("--min-length", type=int, default=default.min_length)
    parser.add_argument("--max-length", type=int, default=default.max_length)
    parser.add_argument("--min-identity", type=float, default=default.min_identity)
    parser.add_argument("--max-identity", type=float, default=default.max_identity)
    parser.add_argument(
        "--clusters", metavar="DIR", help="also write uf50.fasta, uf90.fasta and mapping.tsv there"
    )
    options = parser.parse_args(arguments)
    spec = FamilySpec(
        median_length=options.median_length,
        length_sigma=options.length_sigma,
        min_length=options.min_length,
        max_length=options.max_length,
        min_identity=options.min_identity,
        max_identity=options.max_identity,
    )
    try:
        made = simulate_families(
            options.out, options.families, options.members, options.seed, spec, clusters_dir=options.clusters
        )
    except UserError as error:
        print(f"esm2mega: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(
        f"{made.fasta}: {made.sequences} sequences, {made.residues} residues, {made.families} families, "
        f"mean identity to the ancestor {made.mean_identity:.3f}"
    )


if __name__ == "__main__":
    main()
