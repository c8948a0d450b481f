"""The schema's defaults make sense by themselves, and `flatten` and `choices` cover every field."""

import dataclasses

from esm2mega.config.schema import Run, choices, flatten


def test_flatten_gives_dotted_names_in_schema_order():
    leaves = flatten(Run())
    assert list(leaves)[:5] == ["run_dir", "seed", "init_from", "model.size", "model.family"]
    assert leaves["train.early_stopping.patience"] == 0
    assert leaves["optim.betas"] == [0.9, 0.98]
    assert not any(dataclasses.is_dataclass(value) for value in leaves.values())


def test_every_choice_lists_its_default():
    run = Run()
    for key, valid in choices(run).items():
        assert flatten(run)[key] in (*valid, None), key
        assert len(valid) > 1, f"{key} can have one value only; remove it"


def test_two_runs_share_no_mutable_default():
    first, second = Run(), Run()
    first.optim.betas.append(1.0)
    first.train.early_stopping.patience = 3
    assert second == Run()
