"""The report of a training."""

from qbatch.report.charts import Axis, Line, line_chart
from qbatch.report.page import Body, Card, Report

_CURVES = {"loss": "Loss", "learning_rate": "Learning rate", "grad_norm": "Gradient norm"}


def training_body(report: Report) -> Body:
    """Return what the page of a trained model shows."""
    body = Body(
        cards=[
            Card(name="Steps", path="steps"),
            Card(name="Loss of the first steps", path="loss_first"),
            Card(name="Loss of the last steps", path="loss_last"),
            Card(name="Workers", path="workers"),
            Card(name="Seconds", path="seconds", unit=" s"),
        ]
    )
    steps = [point["step"] for point in report["curve"]]
    for key, title in _CURVES.items():
        line = Line(name=title, x=steps, y=[point[key] for point in report["curve"]])
        body.charts.append(
            line_chart(title, [line], x=Axis(label="step"), y=Axis(label=title.lower()))
        )
    return body
