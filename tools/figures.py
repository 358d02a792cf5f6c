"Draw the figures in nbs/images from the ledger, nbs/results/ledger.jsonl. Notebooks only read them: a test must not change files."
from pathlib import Path
import matplotlib
matplotlib.use('Agg')
from balms.recipes import plot_rates, plot_runs, read_ledger

RUNS, RATES = ('softmax', 'bs'), ('bs_dt', 'bs_cbs_dt', 'dt_ms', 'balms')
FIGURES = {'digits_small': (plot_runs, 'digits', 50, RUNS), 'cifar10_small': (plot_runs, 'cifar10', 100, RUNS), 'cifar100_small': (plot_runs, 'cifar100', 100, RUNS),
           'digits_small_rates': (plot_rates, 'digits', 50, RATES), 'cifar10_small_rates': (plot_rates, 'cifar10', 100, RATES), 'cifar100_small_rates': (plot_rates, 'cifar100', 200, RATES)}

nbs = Path(__file__).resolve().parent.parent/'nbs'
rows = read_ledger(nbs/'results'/'ledger.jsonl')
for name, (plot, data, imbalance, methods) in FIGURES.items():
    plot([r for r in rows if (r['recipe']['data'], r['recipe']['imbalance'], r['recipe']['preset']) == (data, imbalance, 'small') and r['recipe']['method'] in methods], nbs/'images'/f'{name}.png')
    print(f'nbs/images/{name}.png')
