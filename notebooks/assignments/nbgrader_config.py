"""nbgrader's settings for these assignments: `nbgrader generate_assignment A1`, `autograde`, `generate_feedback` work here.

`tutorial-moco grade` uses them too, and adds what nbgrader leaves to others: a sandbox, secret seeds, messy notebooks.
"""

from nbconvert.preprocessors import CSSHTMLHeaderPreprocessor, TagRemovePreprocessor
from nbgrader.preprocessors import (
    CheckCellMetadata,
    ClearHiddenTests,
    ClearMarkScheme,
    ClearOutput,
    ComputeChecksums,
    GetGrades,
    IncludeHeaderFooter,
    LockCells,
    SaveCells,
)

from tutorial_moco.classroom.preprocess import Stubs

c = get_config()  # noqa: F821 (nbgrader defines it)
c.CourseDirectory.course_id = "tutorial_moco"
c.TagRemovePreprocessor.enabled = True
c.TagRemovePreprocessor.remove_cell_tags = {"lecturer"}
c.GenerateAssignment.preprocessors = [
    TagRemovePreprocessor, IncludeHeaderFooter, LockCells, Stubs, ClearOutput, CheckCellMetadata, ComputeChecksums,
    SaveCells, ClearHiddenTests, ClearMarkScheme, ComputeChecksums, CheckCellMetadata,
]  # fmt: skip

# Grading: one cell may take minutes (A4 trains); a test's own limits end it earlier.
c.Execute.timeout = 300
c.LimitOutput.max_lines = 200
c.LimitOutput.max_traceback = 20

# Feedback shows aims and reasons, and not the tests.
c.GenerateFeedback.preprocessors = [GetGrades, ClearHiddenTests, CSSHTMLHeaderPreprocessor]
