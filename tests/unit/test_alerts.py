"""Alert rules and dashboard: Prometheus takes them, each fires by its fault and by nothing else."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from lepton.telemetry.instruments import INSTRUMENTS
from lepton.telemetry.metrics import EXPORT_S
from lepton.telemetry.rounds import PERIOD_S

CLUSTERS = Path(__file__).parents[2] / "clusters"
RULES = yaml.safe_load((CLUSTERS / "alerts.yaml").read_text())["groups"][0]["rules"]
MODEL = 'lepton_model="m"'
REQUESTS = "http_server_request_duration"
SCRAPED_S = 10
"""Prometheus' interval, and Ray's between two reports of a process; a test compares."""
OLDEST_S = max(EXPORT_S, SCRAPED_S + PERIOD_S) + SCRAPED_S
"""Of a healthy replica's word: told, sent or reported, and scraped, each as late as may be."""

WELL = {
    f"ray_lepton_serving_alive{{{MODEL}}}": f"-{OLDEST_S:.0f}+10x180",
    f'ray_lepton_serving_alive{{{MODEL},WorkerId="stopped"}}': "10 20 0+0x180",
    f"ray_lepton_serving_rollbacks{{{MODEL}}}": "3+0x180",
    f'ray_{REQUESTS}_count{{{MODEL},http_response_status_code="200"}}': "0+100x180",
    f'ray_{REQUESTS}_bucket{{{MODEL},le="0.1"}}': "0+100x180",
    f'ray_{REQUESTS}_bucket{{{MODEL},le="+Inf"}}': "0+100x180",
    "ray_lepton_train_failures_total": "0+0x180",
    "ray_lepton_checkpoint_age": "60+0x180",
    f"ray_lepton_answers_dropped_total{{{MODEL}}}": "0+0x180",
    "ray_lepton_train_goodput": "0.99+0x180",
    f'ray_lepton_drift{{{MODEL},lepton_version="2"}}': "0.01+0x180",
}
ILL = {
    "LeptonReplicaDown": {f"ray_lepton_serving_alive{{{MODEL}}}": "0+10x170 1700+0x10"},
    "LeptonCanaryRolledBack": {f"ray_lepton_serving_rollbacks{{{MODEL}}}": "3+0x160 4+0x20"},
    "LeptonErrors": {
        f'ray_{REQUESTS}_count{{{MODEL},http_response_status_code="500"}}': "0+2x180",
    },
    "LeptonSlow": {
        f'ray_{REQUESTS}_bucket{{{MODEL},le="0.1"}}': "0+90x180",
        f'ray_{REQUESTS}_bucket{{{MODEL},le="2.5"}}': "0+100x180",
    },
    "LeptonWorkersLost": {"ray_lepton_train_failures_total": "_x170 1+0x10"},
    "LeptonCheckpointOld": {"ray_lepton_checkpoint_age": "1000+10x180"},
    "LeptonInferenceLogDropping": {f"ray_lepton_answers_dropped_total{{{MODEL}}}": "0+1x180"},
    "LeptonTelemetryDropping": {
        'ray_lepton_telemetry_dropped_total{lepton_signal="traces"}': "_x170 7+0x10"
    },
    "LeptonGoodputLow": {"ray_lepton_train_goodput": "0.5+0x180"},
    "LeptonDrift": {f'ray_lepton_drift{{{MODEL},lepton_version="2"}}': "0.5+0x180"},
}
"""By alert, what is otherwise than well; a value every ten seconds."""

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="no promtool: `make test` installs it (apt-get install prometheus)",
)


def _promtool(*given: object) -> str:
    done = subprocess.run(
        ["promtool", *map(str, given)], capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def _plain(series: dict[str, str]) -> dict[str, str]:
    """The same as the collector names it: with units, without ``ray_``."""
    units = {"alive": "seconds", "age": "seconds", REQUESTS: "seconds"}
    units |= {"goodput": "ratio", "drift": "ratio"}
    found: dict[str, str] = {}
    for name, values in series.items():
        for word, unit in units.items():
            name = re.sub(rf"({word})(?=[_{{]|$)", rf"\1_{unit}", name)
        found[name.removeprefix("ray_")] = values
    return found


@needs_promtool
def test_prometheus_takes_the_configuration_and_the_rules() -> None:
    assert f"{len(RULES)} rules found" in _promtool("check", "rules", CLUSTERS / "alerts.yaml")
    _promtool("check", "config", CLUSTERS / "prometheus.yaml")


def test_figures_are_as_old_as_the_rules_take_them_to_be() -> None:
    import ray

    scraped = yaml.safe_load((CLUSTERS / "prometheus.yaml").read_text())["global"]
    assert scraped["scrape_interval"] == f"{SCRAPED_S}s"
    assert ray._config.metrics_report_interval_ms() == SCRAPED_S * 1000


@needs_promtool
def test_prometheus_takes_the_dashboards_expressions(tmp_path: Path) -> None:
    dashboard = json.loads((CLUSTERS / "grafana.json").read_text())
    shown = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", ())]
    rules = [{"record": f"shown:{n}", "expr": expr} for n, expr in enumerate(shown)]
    path = tmp_path / "rules.yaml"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))

    assert f"{len(shown)} rules found" in _promtool("check", "rules", path)


@needs_promtool
def test_each_alert_fires_by_its_fault_and_by_nothing_else(tmp_path: Path) -> None:
    assert sorted(ILL) == sorted(rule["alert"] for rule in RULES)
    tests: list[dict[str, Any]] = []
    for named in (dict, _plain):
        for alert, ill in {"": {}, **ILL}.items():
            series = named(WELL | ill)
            expected = [{"labels": f'{{alertname="{alert}"}}', "value": 1}] if alert else []
            tests.append(
                {
                    "interval": "10s",
                    "input_series": [{"series": s, "values": v} for s, v in series.items()],
                    "promql_expr_test": [
                        {
                            "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                            "eval_time": "30m",
                            "exp_samples": expected,
                        }
                    ],
                }
            )
    body = {
        "rule_files": [str(CLUSTERS / "alerts.yaml")],
        "evaluation_interval": "30s",
        "tests": tests,
    }
    path = tmp_path / "tests.yaml"
    path.write_text(json.dumps(body))

    assert "SUCCESS" in _promtool("test", "rules", path)


def _asked(text: str) -> set[str]:
    """The metrics that expressions ask for, as instruments are called."""
    text = text.replace("(ray_)?", "").replace("(_seconds)?", "").replace("(_ratio)?", "")
    names = re.findall(r'__name__=~"([a-z_()?|]+)"', text)
    return {
        re.sub(r"(\(_bytes\)\?)?(_total|_count|_bucket|_sum)$|\(_bytes\)\?$", "", n) for n in names
    }


def test_alerts_and_dashboard_ask_for_metrics_that_there_are() -> None:
    known = {name.replace(".", "_") for name in INSTRUMENTS}
    labels = {key.replace(".", "_") for i in INSTRUMENTS.values() for key in i.attributes}
    dashboard = json.loads((CLUSTERS / "grafana.json").read_text())
    shown = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", ())]
    alerts = [rule["expr"] for rule in RULES]

    for expression in (*alerts, *shown):
        assert _asked(expression) <= known, expression
        assert _asked(expression), expression
        for by in re.findall(r"by \(([a-z_, ]+)\)", expression):
            assert set(by.split(", ")) <= labels | {"le", "instance"}, expression
    assert len({panel["title"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_what_the_dashboard_leaves_out_is_this() -> None:
    dashboard = (CLUSTERS / "grafana.json").read_text().replace('\\"', '"')
    left = {n.replace(".", "_") for n in INSTRUMENTS} - _asked(dashboard)

    assert left == {"lepton_disagreement", "lepton_read_rows"}
