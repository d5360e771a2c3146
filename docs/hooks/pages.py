"""What the site does beyond its pages: README.md and its like among them, links as GitHub has them, equations.

Every page is written for GitHub, where a link is a path from the file that holds it. On the site some files lie
elsewhere, and others are not there at all.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

import mathjax
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).resolve().parents[2]
ADOPTED = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
MATHJAX = "mathjax/tex-svg.js"
LINK = re.compile(r"(\]\()([^)\s#]+)([^)\s]*\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files of the root, and MathJax's one script, as its package brings it."""
    for source, page in ADOPTED.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    script = Path(mathjax.__file__).parent / "static" / "mathjax" / "es5" / "tex-svg.js"
    files.append(File.generated(config, MATHJAX, abs_src_path=str(script)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the site has them: to a page where there is one, to the repository otherwise."""
    adopted = {page: source for source, page in ADOPTED.items()}
    home = posixpath.dirname(adopted.get(page.file.src_uri, f"docs/{page.file.src_uri}"))

    def lead(link: re.Match[str]) -> str:
        before, target, after = link.groups()
        if ":" in target:
            return link[0]
        path = posixpath.normpath(posixpath.join(home, target))
        if not (ROOT / path).exists():
            return link[0]  # which mkdocs tells of
        uri = ADOPTED.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(uri):
            where = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")
        else:
            where = f"{config.repo_url}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}"
        return f"{before}{where}{after}"

    return LINK.sub(lead, markdown)


def on_page_content(html: str, page: Page, **_: object) -> str:
    """The script, on pages that have equations."""
    if 'class="arithmatex"' not in html:
        return html
    return f'{html}\n<script src="{get_relative_url(MATHJAX, page.url)}" defer></script>'
