"""How Sphinx builds the book. Formulas become MathML, which browsers draw themselves: no script, no font, no network."""

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

project = "tutorial_moco"
author = "the tutorial_moco authors"
copyright = "the tutorial_moco authors, MIT licence"
extensions = ["myst_nb"]
html_theme = "furo"
html_title = "Momentum Contrast by building it"
html_static_path = ["static"]
html_css_files = ["book.css"]
html_js_files = ["frames.js"]
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False

nb_execution_mode = "off"  # the outputs are those that `make notebooks` wrote
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "mathml"


def setup(app):
    """Formulas as MathML."""

    def inline(self, node):
        self.body.append(convert(node.astext()))
        raise SkipNode

    def block(self, node):
        self.body.append(f'<div class="formula">{convert(node.astext(), display="block")}</div>')
        raise SkipNode

    app.add_html_math_renderer("mathml", inline_renderers=(inline, None), block_renderers=(block, None))
