import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import f1_score

from ssast.engine.evaluation.metrics import classification_metrics, verification_metrics
from ssast.engine.evaluation.probabilities import probabilities


def test_scores_of_a_small_case_by_hand():
    logits = np.array([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [1.5, 1.0, 1.0], [0.0, 0.0, 3.0]])
    targets = np.eye(3)[[0, 1, 1, 2]]
    scores = classification_metrics(logits, targets, "ce")
    assert scores["accuracy"] == 0.75
    assert "top5" not in scores
    # F1: 2/3 for class 0 (one wrong), 2/3 for class 1 (one missed), 1 for class 2.
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert scores["dprime"] > 0 and 0 < scores["map"] <= 1


def test_average_precision_and_auc_of_several_labels():
    targets = np.array([[1, 0], [0, 1], [1, 1], [0, 0]])
    logits = np.array([[3.0, -1.0], [2.0, 3.0], [1.0, 2.0], [0.0, 0.0]])
    scores = classification_metrics(logits, targets, "bce")
    assert "accuracy" not in scores
    # Class 0 ranks right, wrong, right: (1 + 2/3) / 2. Class 1 is perfect.
    assert scores["map"] == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)
    assert scores["mauc"] == pytest.approx((0.75 + 1) / 2)
    # The quantile of the normal distribution at 0.875.
    assert scores["dprime"] == pytest.approx(math.sqrt(2) * 1.1503493803760079)


def test_classes_without_clips_are_left_out():
    logits, targets = np.random.default_rng(0).standard_normal((20, 8)), np.eye(8)[[0, 1] * 10]
    scores = classification_metrics(logits, targets, "ce")
    assert {"top5", "map", "mauc"} <= set(scores) and not any(map(math.isnan, scores.values()))
    assert classification_metrics(logits[:0], targets[:0], "ce") == {}


def test_chance_is_half_of_the_area():
    random = np.random.default_rng(0)
    scores = classification_metrics(
        random.standard_normal((4000, 3)), np.eye(3)[[0, 1, 2, 0] * 1000], "ce"
    )
    assert scores["mauc"] == pytest.approx(0.5, abs=0.03)
    assert scores["dprime"] == pytest.approx(0.0, abs=0.1)


def test_scores_follow_the_loss_whatever_the_labels_are():
    """One label each: a model trained with bce is ranked by its sigmoids, as one of several is."""
    # Softmax puts the first clip before the second in class 0, sigmoid after it.
    logits = np.array([[1.0, -9.0, -9.0], [2.0, 3.0, -9.0], [-2.0, -3.0, -1.0]])
    targets = np.eye(3)[[0, 1, 2]]
    ce, bce = (classification_metrics(logits, targets, loss) for loss in ("ce", "bce"))
    assert ce["accuracy"] == bce["accuracy"] == 1.0
    assert ce["map"] == 1.0
    assert bce["map"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    # Above 1/2: clips 0 and (wrong) 1 of class 0; 1 of class 1; none of class 2.
    assert ce["macro_f1"] == 1.0
    assert bce["macro_f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    several = np.vstack([targets, [1, 1, 0]])
    assert classification_metrics(np.vstack([logits, [9.0, 9.0, -9.0]]), several, "bce")["map"] == (
        pytest.approx((5 / 6 + 1 + 1) / 3)
    )


def test_probabilities():
    logits = np.array([[0.0, math.log(3)], [1000.0, -1000.0]])
    assert probabilities(logits, "ce").tolist() == [[0.25, 0.75], [1.0, 0.0]]
    assert probabilities(logits, "bce")[0].tolist() == pytest.approx([0.5, 0.75])
    assert np.isfinite(probabilities(logits, "bce")).all()


def test_equal_error_rate_by_hand():
    """True claims 4 3 1, false ones 2 0: between 1 and 2, a third missed or a half accepted."""
    same, scores = np.array([1, 1, 1, 0, 0]), np.array([4.0, 3.0, 1.0, 2.0, 0.0])
    found = verification_metrics(scores, same)
    # The ROC rises at false = 0 to a hit of 2/3, runs to false = 1/2: it meets miss = false at 1/3.
    assert found["eer"] == pytest.approx(1 / 3)
    assert found["min_dcf"] == pytest.approx(1 / 3)  # a third missed, none accepted
    assert verification_metrics(-scores, same)["min_dcf"] == 1.0  # best: refuse all
    perfect = verification_metrics(np.array([2.0, 1.0]), np.array([1, 0]))
    assert perfect == {"eer": 0.0, "min_dcf": 0.0}


def test_each_clip_claims_each_class():
    logits = np.array([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [1.5, 1.0, 1.0], [0.0, 0.0, 3.0]])
    targets = np.eye(3)[[0, 1, 1, 2]]
    found = classification_metrics(logits, targets, "ce")
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    want = verification_metrics(shares.ravel(), targets.ravel())
    assert {name: found[name] for name in want} == pytest.approx(want)
    assert 0 < found["eer"] < 0.5
    several = np.array([[1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1]])
    several = classification_metrics(logits, several, "bce")
    assert "eer" not in several


def test_clips_without_a_label_count_as_negatives():
    targets = np.array([[1, 0], [0, 0], [0, 0], [1, 0]])
    logits = np.array([[2.0, 0.5], [1.0, -1.0], [-2.0, -1.0], [-1.0, -1.0]])
    scores = classification_metrics(logits, targets, "bce")
    assert scores["map"] == pytest.approx((1 + 2 / 3) / 2)  # ranks right, wrong, right
    assert scores["macro_f1"] == pytest.approx(0.5) and "accuracy" not in scores
    assert classification_metrics(logits, np.zeros((4, 2), int), "bce") == {}


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 4).flatmap(
        lambda count: arrays(bool, st.tuples(st.just(2), st.integers(1, 9), st.just(count)))
    )
)
def test_f1_is_that_of_scikit_learn(found):
    """Of each class by itself: of one column, f1_score takes the absence for a class."""
    chosen, targets = found
    logits = np.where(chosen, 1.0, -1.0)
    scores = classification_metrics(logits, targets.astype(int), "bce")
    present = np.flatnonzero(targets.any(0))
    want = [f1_score(targets[:, n], chosen[:, n], zero_division=0) for n in present]
    assert ("macro_f1" in scores) == bool(want)
    if want:
        assert scores["macro_f1"] == pytest.approx(np.mean(want))


def test_f1_where_one_class_is_present():
    logits = np.eye(2)[[0] * 9 + [1]]
    assert classification_metrics(logits, np.eye(2)[[0] * 10], "ce")["macro_f1"] == 18 / 19
