"""Simulated families have the stated similarity and natural frequencies, and the same bytes per seed."""

import hashlib

import numpy as np
import pytest

from esm2mega.errors import UserError
from esm2mega.quickstart.simulate import (
    CODE_U,
    CODE_X,
    GAP,
    LG_FREQUENCIES,
    RESIDUES,
    FamilySpec,
    SubstitutionModel,
    greedy_clusters,
    main,
    simulate_families,
    simulate_family,
)

PLAIN = FamilySpec(deletion_rate=0.0, unknown_rate=0.0, selenocysteine_rate=0.0)


@pytest.fixture(scope="module")
def model():
    return SubstitutionModel()


def read_fasta(path):
    records = {}
    for line in path.read_text().splitlines():
        if line.startswith(">"):
            name = line[1:].split()[0]
            assert name not in records
            records[name] = ""
        else:
            records[name] += line
    return records


def test_lg_has_its_published_frequencies_as_equilibrium(model):
    """Literal values from Le and Gascuel (2008): Q_ij = s_ij pi_j leaves pi unchanged at any time."""
    far = model.transition(np.arange(20, dtype=np.uint8), np.full(20, 500.0))
    np.testing.assert_allclose(far, np.tile(model.frequencies, (20, 1)), atol=1e-9)
    assert LG_FREQUENCIES[RESIDUES.index("L")] == 0.099081
    assert LG_FREQUENCIES[RESIDUES.index("W")] == 0.012066
    # Detailed balance, and one expected substitution per unit of time.
    short = model.transition(np.arange(20, dtype=np.uint8), np.full(20, 1e-4))
    flow = model.frequencies[:, None] * short
    np.testing.assert_allclose(flow, flow.T, atol=1e-12)
    assert (model.frequencies * (1 - np.diag(short))).sum() == pytest.approx(1e-4, rel=1e-2)
    # Isoleucine and valine have the largest exchangeability (10.649107), glutamate and cysteine the smallest.
    i, v, e, c = (RESIDUES.index(letter) for letter in "IVEC")
    exchange = short / model.frequencies
    assert exchange[i, v] / exchange[e, c] == pytest.approx(10.649107 / 0.003499, rel=0.02)


def test_transition_composes(model):
    """Two branches in a row are the branch of their sum: the chain has no memory."""
    codes = np.arange(20, dtype=np.uint8)
    first, second, both = (model.transition(codes, np.full(20, time)) for time in (0.3, 0.5, 0.8))
    np.testing.assert_allclose(first @ second, both, atol=1e-12)


@pytest.mark.parametrize("identity", [0.55, 0.75, 0.9])
def test_members_have_the_asked_identity(model, identity):
    spec = FamilySpec(
        median_length=300, length_sigma=0.0, min_identity=identity, max_identity=identity, deletion_rate=0.0
    )
    rng = np.random.default_rng(0)
    observed = np.concatenate(
        [simulate_family(model, 40, spec, rng).identity_to_ancestor() for _ in range(10)]
    )
    assert observed.mean() == pytest.approx(identity, abs=0.01)
    assert observed.std() < 0.04


def test_identity_out_of_reach_is_the_longest_branch(model):
    ancestor = np.zeros(50, dtype=np.uint8)
    (time,) = model.time_for_identity(ancestor, np.ones(50), np.array([0.01]))
    assert time == 20.0


def test_sites_differ_in_conservation_and_subfamilies_share_substitutions(model):
    spec = FamilySpec(median_length=300, length_sigma=0.0, subfamilies=2)
    family = simulate_family(model, 100, spec, np.random.default_rng(3))
    conservation = (family.members == family.ancestor).mean(axis=0)
    assert (conservation > 0.97).mean() > 0.2
    assert (conservation < 0.6).mean() > 0.1

    def identity(a, b):
        return np.mean([(family.members[i] == family.members[j]).mean() for i in a for j in b if i != j])

    even, odd = range(0, 20, 2), range(1, 20, 2)
    assert identity(even, even) > identity(even, odd) + 0.02


def test_residue_frequencies_stay_natural(tmp_path):
    simulate_families(tmp_path / "a.fasta", 120, 5, seed=5, spec=PLAIN)
    text = "".join(sequence[1:] for sequence in read_fasta(tmp_path / "a.fasta").values())
    observed = np.array([text.count(letter) for letter in RESIDUES]) / len(text)
    np.testing.assert_allclose(observed, LG_FREQUENCIES, atol=0.004)


def test_lengths_follow_the_log_normal(tmp_path):
    simulate_families(tmp_path / "a.fasta", 600, 1, seed=6, spec=PLAIN)
    lengths = np.array([len(sequence) for sequence in read_fasta(tmp_path / "a.fasta").values()])
    assert np.median(lengths) == pytest.approx(294, rel=0.08)
    assert lengths.mean() == pytest.approx(361, rel=0.08)
    assert lengths.min() >= 30
    assert lengths.max() <= 2000


def test_odd_residues_and_deletions_are_there_and_rare(model):
    spec = FamilySpec(unknown_rate=0.01, selenocysteine_rate=0.2, deletion_rate=0.01)
    rng = np.random.default_rng(1)
    rows = [simulate_family(model, 20, spec, rng).members.ravel() for _ in range(10)]
    codes = np.concatenate(rows)
    assert (codes == CODE_X).mean() == pytest.approx(0.01, rel=0.2)
    assert (codes == CODE_U).sum() > 0
    # About deletion_rate x deletion_length of the columns, a little less for overlaps.
    assert 0.018 < (codes == GAP).mean() < 0.027


def test_every_protein_starts_with_methionine(tmp_path):
    simulate_families(tmp_path / "a.fasta", 5, 10, spec=FamilySpec(unknown_rate=0.3, deletion_rate=0.3))
    assert {sequence[0] for sequence in read_fasta(tmp_path / "a.fasta").values()} == {"M"}


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for name, seed in (("a", 1234), ("b", 1234), ("c", 1235)):
        simulate_families(tmp_path / f"{name}.fasta", 3, 4, seed=seed, clusters_dir=tmp_path / name)
    one, two, other = ((tmp_path / f"{name}.fasta").read_bytes() for name in "abc")
    assert one == two != other
    assert (tmp_path / "a" / "mapping.tsv").read_bytes() == (tmp_path / "b" / "mapping.tsv").read_bytes()
    assert hashlib.sha256(one).hexdigest() == DIGEST


def test_a_family_does_not_depend_on_how_many_follow(tmp_path):
    simulate_families(tmp_path / "a.fasta", 1, 4)
    simulate_families(tmp_path / "b.fasta", 2, 4)
    assert (tmp_path / "b.fasta").read_text().startswith((tmp_path / "a.fasta").read_text())


def test_cluster_files_agree_with_each_other_and_with_the_fasta(tmp_path):
    spec = FamilySpec(median_length=120, length_sigma=0.3, min_identity=0.6, max_identity=0.99)
    made = simulate_families(tmp_path / "all.fasta", 8, 30, seed=2, spec=spec, clusters_dir=tmp_path / "uf")
    proteins = read_fasta(tmp_path / "all.fasta")
    uniref50, uniref90 = (
        read_fasta(tmp_path / "uf" / "uf50.fasta"),
        read_fasta(tmp_path / "uf" / "uf90.fasta"),
    )
    header, *rows = (tmp_path / "uf" / "mapping.tsv").read_text().splitlines()
    assert header == "uniref50_id\tuniref90_ids"
    mapping = {row.split("\t")[0]: row.split("\t")[1].split(",") for row in rows}

    assert set(mapping) == set(uniref50)
    members = [member for cluster in mapping.values() for member in cluster]
    assert len(members) == len(set(members))
    assert set(members) == set(uniref90)
    for representative, cluster in mapping.items():
        assert uniref50[representative] == uniref90[cluster[0]]
        assert representative.removeprefix("UniRef50_") == cluster[0].removeprefix("UniRef90_")
    for name, sequence in uniref90.items():
        assert proteins[name.removeprefix("UniRef90_")] == sequence
    assert made.uniref90_clusters == len(uniref90) < made.sequences == 240
    assert made.uniref50_clusters == len(uniref50) >= 8


def test_greedy_clusters_keep_their_threshold():
    rows = np.array(
        [
            [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
            [0, 1, 2, 3, 4, 5, 6, 7, 8, 0],  # 9 of 10
            [0, 1, 2, 3, 4, 5, 6, 7, 0, 0],  # 8 of 10
            [GAP, 1, 2, 3, 4, 5, 6, 7, 8, 9],  # 9 of its 9
            [GAP, GAP, 2, 3, 4, 5, 6, 7, 0, 0],  # 8 of 8 with the third, 6 of 8 with the first
        ],
        dtype=np.uint8,
    )
    assert greedy_clusters(rows, 0.9) == [[0, 1, 3], [2, 4]]
    assert greedy_clusters(rows, 0.5) == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_families": 0}, "n_families=0 must be at least 1"),
        ({"members": 0}, "members=0 must be at least 1"),
        ({"spec": FamilySpec(min_identity=0.9, max_identity=0.8)}, "min_identity=0.9 <= max_identity=0.8"),
        ({"spec": FamilySpec(min_length=400)}, "min_length=400 <= median_length=294"),
        ({"spec": FamilySpec(gamma_shape=0)}, "gamma_shape=0 must be positive"),
    ],
)
def test_bad_arguments_name_the_rule_and_write_nothing(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        simulate_families(tmp_path / "a.fasta", **arguments)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "mapping.tsv").write_text("mine")
    with pytest.raises(UserError, match=r"mapping\.tsv exists"):
        simulate_families(tmp_path / "a.fasta", 1, 2, clusters_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mapping.tsv"]


def test_command_line(tmp_path, capsys):
    main(
        [
            str(tmp_path / "a.fasta"),
            "--families",
            "2",
            "--members",
            "3",
            "--median-length",
            "50",
            "--min-length",
            "40",
        ]
    )
    assert "6 sequences" in capsys.readouterr().out
    assert len(read_fasta(tmp_path / "a.fasta")) == 6
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "a.fasta")])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("esm2mega: error: ")


# SHA-256 of the FASTA of test_the_same_seed_gives_the_same_bytes: a change of the simulation must be a
# decision.
DIGEST = "9b369612edd48c78be83c2c2815ed5af9163739fd47286af3eb9b37d8e409a68"
