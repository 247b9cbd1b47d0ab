"""Two groups of classes: how they are written, what a method sees of them, and how clusters are judged by them."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small import few_digits, with_settings

from jaxclust.config import from_file
from jaxclust.data.groups import classes, groups_of
from jaxclust.errors import ConfigError
from jaxclust.evaluation import groups
from jaxclust.methods.base import DataInfo, Method
from jaxclust.train.stage import first_targets, seen_labels

TEN = list(range(10))


def clustnet(**overrides):
    return with_settings(from_file(Path("configs/clustnet.py"), "digits"), **overrides)


def test_groups_are_spans_and_single_classes_and_the_first_is_one():
    assert groups_of("0-4,5-9", 10).tolist() == [1] * 5 + [0] * 5
    assert groups_of(" 1+3 , 0+2+4-5", 6).tolist() == [0, 1, 0, 1, 0, 0]
    assert classes("5-6,0")[0] == [5, 6] and groups_of("1,0", 2).dtype == np.int32


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0-4,4-9", "these are in both: 4"),
        ("0-3,5-8", "these are in none: 4, 9"),
        ("0-4,5-11", "these do not exist: 10, 11"),
        ("0-4,5-999999", "these do not exist: 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, …"),
        ("0-4,5-99999999999", "must be two groups of class numbers"),
        ("0-9", "has 1 groups and must have two"),
        ("0,1,2-9", "has 3 groups and must have two"),
        ("", "must be two groups of class numbers, such as '0-4,5-9'"),
        ("a-b,c", "must be two groups of class numbers"),
        ("0-4,", "must be two groups of class numbers"),
        ("0-9,7-6", "must be two groups of class numbers"),
    ],
)
def test_groups_that_overlap_or_miss_a_class_are_refused_by_name(text, words):
    with pytest.raises(ConfigError, match=re.escape(f"config.groups={text!r}")) as error:
        groups_of(text, 10)
    assert words in str(error.value)


def test_only_the_group_of_an_image_reaches_its_target_and_unknown_ones_are_not_trained_on():
    split = few_digits(60).splits["train"]
    labels = split.labels.copy()
    labels[7], labels[8] = -1, 12  # a class of a folder that the training did not have
    method = Method(init=None, loss=None, embed=None, labels="group")
    info = DataInfo(60, split.image_shape, 10)
    seen = seen_labels(method, clustnet(), info, replace(split, labels=labels))
    targets = first_targets(method, 60, seen, {})
    expected = (split.labels < 5).astype(int)
    expected[7:9] = -1
    np.testing.assert_array_equal(targets.target, expected)
    assert targets.ids.tolist() == [i for i in range(60) if i not in (7, 8)]
    assert seen_labels(method._replace(labels=None), clustnet(), info, split) is None


def predictions(cluster, k):
    """What a gate that is sure would say, and experts that are always right about the group of a digit."""
    gate = np.log(np.maximum(np.eye(k)[cluster], 1e-200))
    return {"cluster": np.asarray(cluster), "log_probs": gate, "groups": np.log(np.full((len(gate), 2), 0.5))}


def measured(cluster, labels, k=5, binary=None, **overrides):
    found = predictions(cluster, k) | {"binary": np.zeros(len(labels), int) if binary is None else binary}
    return groups.measure(found, labels, clustnet(cluster__k=k, **overrides), None)


def test_each_group_is_matched_alone():
    labels = np.repeat(TEN, 3)
    cluster = np.array([3, 1, 4, 0, 2, 1, 0, 2, 3, 4])[labels]  # expert 3: digits 0 and 8
    values = measured(cluster, labels, binary=(labels < 5).astype(int))
    assert values["acc_p"] == values["acc_n"] == values["binary"] == 1
    assert values["nmi_p"] == pytest.approx(1) and values["gate_entropy"] == pytest.approx(0)
    assert values["usage_entropy"] == pytest.approx(np.log(5)) and values["nll"] == pytest.approx(np.log(2))
    assert values["usage3"] == pytest.approx(0.2)


def test_one_expert_for_all_images_gets_the_share_of_the_largest_class():
    labels = np.repeat(TEN, [4, 1, 1, 1, 1, 1, 1, 1, 1, 6])
    values = measured(np.full(len(labels), 2), labels, binary=(labels < 5).astype(int))
    assert values["acc_p"] == pytest.approx(4 / 8) and values["acc_n"] == pytest.approx(6 / 10)
    assert values["usage_entropy"] == pytest.approx(0) and values["usage2"] == 1


@pytest.mark.parametrize(("k", "acc"), [(4, 0.8), (7, 1.0)])
def test_any_number_of_experts_is_matched_and_classes_left_over_are_errors(k, acc):
    labels = np.repeat(TEN, 2)
    assert measured(np.minimum(labels % 5, k - 1), labels, k)["acc_p"] == pytest.approx(acc)


def test_unknown_labels_do_not_count_and_other_methods_have_no_such_figures():
    labels = np.array([0, 0, 1, -1, 7])
    values = measured(np.array([0, 0, 1, 4, 2]), labels, binary=np.array([1, 1, 0, 0, 0]))
    assert values["binary"] == pytest.approx(3 / 4) and values["acc_p"] == 1
    assert "acc_p" not in measured(np.zeros(2, int), np.array([5, 6]))
    assert groups.measure({"cluster": labels}, labels, clustnet(), None) == {}
    assert groups.measure(predictions([0], 5), None, clustnet(), None) == {}
    assert measured(np.zeros(3, int), np.full(3, -1)) == {}


def test_judged_are_the_true_groups_for_any_seed_unless_those_of_the_published_code_are_asked_for():
    for seed in (0, 1, 2):
        assert groups.judged(clustnet(seed=seed)) == (TEN[:5], TEN[5:])
    upstream = {seed: groups.judged(clustnet(seed=seed, evaluate__metric_groups="upstream")) for seed in (1, 2)}
    assert upstream[1] == ([2, 9, 6, 4, 0], [1, 3, 5, 7, 8])
    assert upstream[2] == ([4, 1, 5, 0, 7], [2, 3, 6, 8, 9])
    labels = np.repeat(TEN, 2)
    expert = np.array([[2, 9, 6, 4, 0].index(c) if c in upstream[1][0] else 3 for c in labels])
    values = measured(expert, labels, 5, seed=1, evaluate__metric_groups="upstream")
    assert values["acc_p"] == 1 and values["acc_n"] == pytest.approx(0.2)
    assert measured(expert, labels, 5, seed=1)["acc_p"] < 1
