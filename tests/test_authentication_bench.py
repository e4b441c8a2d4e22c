"""Which tests the benchmark of membership tests holds against each other, at which cost."""

import pytest

from benchmarks import authentication

COSTS = {
    "loss-difference": {4: 0.7, 64: 0.9},
    "cgi-dm": {100: 0.6, 120: 0.7, 200: 0.75, 400: 0.8},
    "cgi-dm-faithful": {100: 0.5, 200: 0.6, 400: 0.65},
    "loss": {64: 0.55},
    "secmi": {24: 0.5},
    "pia": {2: 0.6},
    "pfami": {220: 0.85},
}


def test_cgi_dm_is_compared_at_equal_cost_at_a_third_and_with_earlier_tests():
    case = {"set": "a", "tuner": "full", "n0": 10, "steps": 25}
    results = [
        {
            "metric": "AUC",
            "method": name,
            "value": value + seed / 100,
            "seed": seed,
            "case": case | {"evaluations": cost},
        }
        for name, costs in COSTS.items()
        for cost, value in costs.items()
        for seed in range(3)
    ]
    rows = [row for row in authentication._differences(results) if row.method == "cgi-dm"]
    found = {
        (row.case["against"], row.case["evaluations"], row.case.get("evaluations_against")): row.value for row in rows
    }
    assert found == pytest.approx({
        ("cgi-dm-faithful", 100, None): 0.1,
        ("cgi-dm-faithful", 200, None): 0.15,
        ("cgi-dm-faithful", 400, None): 0.15,
        ("cgi-dm-faithful", 120, 400): 0.05,
        ("loss", 400, 64): 0.25,
        ("secmi", 400, 24): 0.3,
        ("pia", 400, 2): 0.2,
        ("pfami", 400, 220): -0.05,
    })  # fmt: skip
