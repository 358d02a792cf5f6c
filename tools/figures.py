"Draw the figures in nbs/images from the ledger, nbs/results/ledger.jsonl. Notebooks only read them: a test must not change files."
from pathlib import Path
import matplotlib
matplotlib.use('Agg')
from balms.recipes import plot_rates, plot_runs, read_ledger

nbs = Path(__file__).resolve().parent.parent/'nbs'
rows = read_ledger(nbs/'results'/'ledger.jsonl')
for data, preset in sorted({(r['recipe']['data'], r['recipe']['preset']) for r in rows}):
    own = [r for r in rows if (r['recipe']['data'], r['recipe']['preset']) == (data, preset)]
    kinds = {'': (plot_runs, [r for r in own if r['recipe']['method'] in ('softmax', 'bs')]), '_rates': (plot_rates, [r for r in own if r['recipe']['method'] in ('bs_dt', 'bs_cbs_dt', 'dt_ms', 'balms')])}
    for kind, (plot, some) in kinds.items():
        if not some or kind and not any('r' in r for r in some): continue
        path = nbs/'images'/f'{data}_{preset}{kind}.png'
        plot(some, path)
        print(path.relative_to(nbs.parent))
