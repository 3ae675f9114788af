"""What nbgrader has no preprocessor for: a student's version in which solutions have gaps, or code to mend."""

from nbgrader.preprocessors import ClearSolutions
from traitlets import Bool, Dict

from tutorial_moco.classroom.release import GIVEN, STUB, with_gaps
from tutorial_moco.classroom.rescue import is_answer


class Stubs(ClearSolutions):
    """nbgrader's ClearSolutions, but a cell tagged ``given``, or any with ``gaps``, keeps its solution with the gaps shown."""

    gaps = Bool(False, help="Show every solution with its gaps, in place of a stub").tag(config=True)
    code_stub = Dict({"python": STUB}).tag(config=True)

    def preprocess_cell(self, cell, resources, cell_index):
        """One cell."""
        whole = cell.source
        cell, resources = super().preprocess_cell(cell, resources, cell_index)
        if is_answer(cell, "code") and (self.gaps or GIVEN in cell.metadata.get("tags", [])):
            cell.source = with_gaps(whole)
        return cell, resources
