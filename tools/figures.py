"Draw the figures in nbs/images: those of runs from the ledger, nbs/results/ledger.jsonl. Notebooks only read them: a test must not change files."
from pathlib import Path
import matplotlib, torch
matplotlib.use('Agg')
import matplotlib.pyplot as plt
from balms.core import log_prior
from balms.recipes import plot_rates, plot_runs, read_ledger
from balms.theory import GaussianClasses

RUNS, RATES = ('softmax', 'bs'), ('bs_dt', 'bs_cbs_dt', 'dt_ms', 'balms')
FIGURES = {'digits_small': (plot_runs, 'digits', 50, RUNS), 'cifar10_small': (plot_runs, 'cifar10', 100, RUNS), 'cifar100_small': (plot_runs, 'cifar100', 100, RUNS),
           'digits_small_rates': (plot_rates, 'digits', 50, RATES), 'cifar10_small_rates': (plot_rates, 'cifar10', 100, RATES), 'cifar100_small_rates': (plot_rates, 'cifar100', 200, RATES)}
nbs = Path(__file__).resolve().parent.parent/'nbs'

def label_shift(path):
    "What label_shift.html shows at its start, for readers without scripts"
    world, x, n = GaussianClasses([[-1.5], [0.], [1.5]]), torch.linspace(-5.5, 5.5, 1101, dtype=torch.float64)[:, None], torch.tensor([1000., 100., 10.])
    lik, truth, trained = world.log_lik(x), world.posterior(x), world.posterior(x, n).log()
    plt.rcParams.update({'font.size': 9, 'axes.spines.top': False, 'axes.spines.right': False})
    fig, axs = plt.subplots(3, 2, figsize=(8.2, 4.4), dpi=150, sharex=True, height_ratios=[3, 6, 1.3], gridspec_kw=dict(hspace=.12, wspace=.12))
    for col, (title, below, share, shift) in zip(axs.T, (('Plain softmax', 'both learn from 1,000, 100 and 10 images', n, 0), ('Balanced Softmax', 'both are asked on a balanced test set', torch.ones(3), log_prior(n)))):
        answer = (trained - shift).softmax(1)                        # the logits are those of training without the shift
        for j, (c, ls) in enumerate(zip(('#0072B2', '#E69F00', '#CC79A7'), ('-', (0, (7, 3)), (0, (2, 2))))):
            d = lik[:, j].exp()*share[j]/share.sum()
            col[0].fill_between(x[:, 0], d, color=c, alpha=.3, lw=0); col[0].plot(x, d, color=c, ls=ls, lw=1.2)
            col[1].plot(x, truth[:, j], color=c, lw=6, alpha=.3); col[1].plot(x, answer[:, j], color=c, ls=ls, lw=1.8)
        for y, p, name in ((1.1, answer, 'predicted'), (0, truth, 'best')):
            cut = [0, *(p.argmax(1).diff().nonzero()[:, 0] + 1).tolist(), len(x) - 1]
            for a, b in zip(cut, cut[1:]):
                j, l, r = p[a:b].argmax(1).mode().values, x[a, 0], x[b, 0]
                col[2].barh(y, r - l, .9, l, align='edge', color=('#0072B2', '#E69F00', '#CC79A7')[j], alpha=.45, ec='#222222', lw=.8)
                col[2].text((l + r)/2, y + .42, f'{name}: {j + 1}'*(r - l > 3.5) or f'{j + 1}', ha='center', va='center', fontsize=8)
                if name == 'predicted' and a: col[1].axvline(l, color='#222222', ls=':', lw=1.2)
        col[0].set_title(f'{title}\n', loc='left', fontsize=11, fontweight='bold'); col[0].text(0, 1.04, below, transform=col[0].transAxes, fontsize=8.5)
        col[0].set(yticks=[], ylim=(0, None), xlim=(-5.5, 5.5)); col[0].tick_params(bottom=False); col[1].tick_params(bottom=False); col[0].spines['left'].set_visible(False)
        col[1].set(ylim=(0, 1.02), yticks=[0, .5, 1], ylabel='probability of each class' if title == 'Plain softmax' else ''); col[1].grid(axis='y', lw=.4)
        col[2].set(yticks=[], ylim=(0, 2), xlabel='x'); col[2].spines['left'].set_visible(False)
    fig.savefig(path, bbox_inches='tight'); plt.close(fig)

if __name__ == '__main__':
    label_shift(nbs/'images'/'label_shift.png')
    rows = read_ledger(nbs/'results'/'ledger.jsonl')
    for name, (plot, data, imbalance, methods) in FIGURES.items():
        plot([r for r in rows if (r['recipe']['data'], r['recipe']['imbalance'], r['recipe']['preset']) == (data, imbalance, 'small') and r['recipe']['method'] in methods], nbs/'images'/f'{name}.png')
        print(f'nbs/images/{name}.png')
