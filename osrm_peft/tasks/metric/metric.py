"""The suites' metrics as an `evaluate` module that loads from this folder, without a network."""

import datasets
import evaluate
from scipy import stats
from sklearn import metrics

_DESCRIPTION = """Accuracy, Matthews correlation, or the mean of Pearson and Spearman correlation, as in GLUE.
`compute` returns `score` in [-1, 1], and for `pearson_spearman` the two correlations besides."""


class TaskMetric(evaluate.Metric):
    def _info(self):
        kind = "float32" if self.config_name == "pearson_spearman" else "int64"
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description="predictions and references: class indices, or numbers for pearson_spearman",
            features=datasets.Features({"predictions": datasets.Value(kind), "references": datasets.Value(kind)}),
        )

    def _compute(self, predictions, references):
        if self.config_name == "accuracy":
            return {"score": float(metrics.accuracy_score(references, predictions))}
        if self.config_name == "matthews":
            return {"score": float(metrics.matthews_corrcoef(references, predictions))}
        if self.config_name != "pearson_spearman":
            raise ValueError(f"unknown metric {self.config_name!r}: accuracy, matthews or pearson_spearman")
        if min(predictions) == max(predictions) or min(references) == max(references):
            return {"score": 0.0, "pearson": 0.0, "spearman": 0.0}  # undefined: a constant predicts nothing
        pearson = float(stats.pearsonr(predictions, references).statistic)
        spearman = float(stats.spearmanr(predictions, references).statistic)
        return {"score": (pearson + spearman) / 2, "pearson": pearson, "spearman": spearman}
