"Draw the figures in nbs/images from the ledger, nbs/results/ledger.jsonl. Notebooks only read them: a test must not change files."
from pathlib import Path
import matplotlib
matplotlib.use('Agg')
from balms.recipes import plot_runs, read_ledger

nbs = Path(__file__).resolve().parent.parent/'nbs'
rows = [r for r in read_ledger(nbs/'results'/'ledger.jsonl') if r['recipe']['method'] in ('softmax', 'bs')]
for data, preset in sorted({(r['recipe']['data'], r['recipe']['preset']) for r in rows}):
    path = nbs/'images'/f'{data}_{preset}.png'
    plot_runs([r for r in rows if (r['recipe']['data'], r['recipe']['preset']) == (data, preset)], path)
    print(path.relative_to(nbs.parent))
