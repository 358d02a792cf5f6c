"See pages without Quarto: `python tools/page.py [nbs/x.ipynb ...] [--out _docs/plain]`"
import re, shutil, subprocess
from pathlib import Path

import pypandoc
from fastcore.script import Param, call_parse

from check_docs import figure_alt
from readme import _code, is_shown, process, project, root

style = '''<style>
body{max-width:52em;margin:2em auto;padding:0 1em;font:16px/1.5 system-ui,sans-serif}
pre{background:#f6f6f6;padding:.6em;overflow:auto;font-size:13px}
img{max-width:100%}table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:2px 8px}
.content-hidden{display:none}iframe{width:100%;border:0}
</style>'''

def blocks(nb):
    "Cells and outputs of a processed notebook, as markdown"
    for c in nb.cells:
        if c.cell_type in ('raw', 'markdown'): yield c.source
        elif c.cell_type == 'code':
            text, images = c.get('outputs', []), []
            if is_shown(c):
                images = [
                    f'![](data:image/png;base64,{"".join(o.data["image/png"]).strip()}){{alt="{figure_alt(c, i)}"}}'
                    for i, o in enumerate(text)
                    if 'image/png' in o.get('data', {})
                ]
            c.outputs = [o for o in text if not any(k.startswith('image/') for k in o.get('data', {}))]
            yield from _code(c)
            yield from images

@call_parse
def main(
    paths:Param('Notebooks; default: all of nbs/', str, nargs='*'),
    out:str='_docs/plain', # Folder of the pages, relative to the repository
):
    "Write plain HTML pages of notebooks, through nbdev's processors and pandoc: for a look, not for the site"
    out = root/out
    out.mkdir(parents=True, exist_ok=True)
    shutil.copytree(root/'nbs/images', out/'images', dirs_exist_ok=True)
    head = out/'head.html'
    head.write_text(style)
    for p in [Path(p).resolve() for p in paths] or sorted((root/'nbs').glob('[!_.]*.ipynb')):
        with project(root): nb = process(p)
        md = re.sub(r'(\]\([\w./-]+)\.ipynb', r'\1.html', '\n\n'.join(blocks(nb)))
        cmd = [
            pypandoc.get_pandoc_path(),
            '-f',
            'markdown',
            '-t',
            'html5',
            '-s',
            '--mathml',
            '--toc',
            '-H',
            str(head),
            '-o',
            str(out / f'{p.stem}.html'),
        ]
        subprocess.run(cmd, input=md, text=True, encoding='utf-8', check=True)
        print((out/f'{p.stem}.html').relative_to(root))
