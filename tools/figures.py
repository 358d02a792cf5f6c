"""Draw the figures in nbs/images: those of runs from the ledger, nbs/results/ledger.jsonl.

Notebooks only read them, since a test must not change files.
"""
from pathlib import Path
import matplotlib, torch
matplotlib.use('Agg')
import matplotlib.pyplot as plt
from balms.core import log_prior
from balms.rows import read_rows, select_rows
from balms.tables import plot_rates, plot_runs
from balms.theory import GaussianClasses

RUNS, RATES = ('softmax', 'bs'), ('bs_dt', 'bs_cbs_dt', 'dt_ms', 'balms')
FIGURES = {
    'digits_small': (plot_runs, 'digits', 50, RUNS), 'digits_small_rates': (plot_rates, 'digits', 50, RATES),
    'cifar10_small': (plot_runs, 'cifar10', 100, RUNS), 'cifar10_small_rates': (plot_rates, 'cifar10', 100, RATES),
    'cifar100_small': (plot_runs, 'cifar100', 100, RUNS), 'cifar100_small_rates': (plot_rates, 'cifar100', 200, RATES)}
COLORS = '#0072B2', '#E69F00', '#CC79A7'
DASHES = '-', (0, (7, 3)), (0, (2, 2))
nbs = Path(__file__).resolve().parent.parent/'nbs'


def draw_bars(ax, x, answers, posteriors):
    "Which class is predicted and which is best, along x; where the prediction changes"
    for y, p, name in ((1.1, answers, 'predicted'), (0, posteriors, 'best')):
        changes = (p.argmax(1).diff().nonzero()[:, 0] + 1).tolist()
        ends = [0, *changes, len(x) - 1]
        for a, b in zip(ends, ends[1:]):
            j, left, right = p[a:b].argmax(1).mode().values, x[a, 0], x[b, 0]
            ax.barh(y, right - left, .9, left, align='edge', color=COLORS[j], alpha=.45, ec='#222222', lw=.8)
            text = f'{name}: {j + 1}' if right - left > 3.5 else f'{j + 1}'
            ax.text((left + right)/2, y + .42, text, ha='center', va='center', fontsize=8)
    return [x[i, 0] for i in (answers.argmax(1).diff().nonzero()[:, 0] + 1).tolist()]


def draw_column(axs, x, likelihood, answers, posteriors, shares, title, below):
    "Classes, probabilities and decisions of one loss"
    classes, probabilities, decisions = axs
    for j, (color, dashes) in enumerate(zip(COLORS, DASHES)):
        density = likelihood[:, j].exp()*shares[j]/shares.sum()
        classes.fill_between(x[:, 0], density, color=color, alpha=.3, lw=0)
        classes.plot(x, density, color=color, ls=dashes, lw=1.2)
        probabilities.plot(x, posteriors[:, j], color=color, lw=6, alpha=.3)
        probabilities.plot(x, answers[:, j], color=color, ls=dashes, lw=1.8)
    for boundary in draw_bars(decisions, x, answers, posteriors):
        probabilities.axvline(boundary, color='#222222', ls=':', lw=1.2)
    classes.set_title(f'{title}\n', loc='left', fontsize=11, fontweight='bold')
    classes.text(0, 1.04, below, transform=classes.transAxes, fontsize=8.5)
    classes.set(yticks=[], ylim=(0, None), xlim=(-5.5, 5.5))
    probabilities.set(ylim=(0, 1.02), yticks=[0, .5, 1])
    probabilities.grid(axis='y', lw=.4)
    decisions.set(yticks=[], ylim=(0, 2), xlabel='x')
    for ax in (classes, probabilities): ax.tick_params(bottom=False)
    for ax in (classes, decisions): ax.spines['left'].set_visible(False)


def label_shift(path):
    "What label_shift.html shows at its start, for readers without scripts"
    world, counts = GaussianClasses([[-1.5], [0.], [1.5]]), torch.tensor([1000., 100., 10.])
    x = torch.linspace(-5.5, 5.5, 1101, dtype=torch.float64)[:, None]
    likelihood, posteriors, trained = world.log_lik(x), world.posterior(x), world.posterior(x, counts).log()
    grid = dict(hspace=.12, wspace=.12)
    fig, axs = plt.subplots(3, 2, figsize=(8.2, 4.4), dpi=150, sharex=True, height_ratios=[3, 6, 1.3], gridspec_kw=grid)
    columns = (
        ('Plain softmax', 'both learn from 1,000, 100 and 10 images', counts, 0),
        ('Balanced Softmax', 'both are asked on a balanced test set', torch.ones(3), log_prior(counts)))
    for column, (title, below, shares, shift) in zip(axs.T, columns):
        answers = (trained - shift).softmax(1)                               # the logits of training without the shift
        draw_column(column, x, likelihood, answers, posteriors, shares, title, below)
    axs[1, 0].set_ylabel('probability of each class')
    fig.savefig(path, bbox_inches='tight')
    plt.close(fig)


if __name__ == '__main__':
    with plt.rc_context({'font.size': 9, 'axes.spines.top': False, 'axes.spines.right': False}):
        label_shift(nbs/'images'/'label_shift.png')
    rows = select_rows(read_rows(nbs/'results'/'ledger.jsonl'), preset='small')
    for name, (plot, data, imbalance, methods) in FIGURES.items():
        plot(select_rows(rows, data=data, imbalance=imbalance, method=methods), nbs/'images'/f'{name}.png')
        print(f'nbs/images/{name}.png')
