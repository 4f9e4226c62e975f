"""Evaluation: a trained network at work, its exact confusion matrix, its predictions as files and as a program.

It must never change a weight or a running statistic.
"""

from fcn.lazy import door

__getattr__, __all__ = door(
    __name__,
    confusion_matrix="ConfusionMatrix",
    evaluate="Evaluator Stopped evaluate_split",
    export="export_checkpoint",
    inference="load_trained",
    predictions="Files plan_files predict_files",
    show="draw_scores show_scores",
)
