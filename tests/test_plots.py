"""plots: every figure is a file of its own, says its counts, says that phantoms are phantoms, and leaves matplotlib as it was."""
import warnings
import matplotlib, numpy as np, pandas as pd, pytest
from matplotlib.figure import Figure
from PIL import Image

from covid_cxr.stats import plots
from covid_cxr.stats.paired import subgroups
from covid_cxr.core import RunError
from covid_cxr.evaluate import evaluate


def scores(n=80, seed=0):
    rng = np.random.default_rng(seed)
    g = np.repeat(np.arange(n), 2)
    y = (np.arange(n) % 2)[g]
    return y, 1 / (1 + np.exp(-(2 * y - 1 + rng.normal(size=n)[g]))), g

Y, P, G = scores()
NAMES = ('other', 'covid')
HISTORY = pd.DataFrame(dict(stage=[1, 1, 2], epoch=[1, 2, 3], frozen=[True, True, False], lr=[1e-3, 1e-3, 1e-4],
                            train_loss=[.7, .5, .3], valid_loss=[.6, .5, .55], accuracy=[.6, .7, .8], auc=[.7, .8, .9],
                            images=[9, 9, 9], seconds=[1., 1., 1.]))

def draw(synthetic=False):
    "Every figure of the module by name"
    e, kw = evaluate(Y, P, groups=G, classes=NAMES, n_boot=200), dict(synthetic=synthetic)
    return dict(
        plot_confusion=plots.plot_confusion(e, **kw), plot_roc=plots.plot_roc(e, **kw), plot_pr=plots.plot_pr(e, **kw),
        plot_scores=plots.plot_scores(Y, P, .5, NAMES, **kw), plot_reliability=plots.plot_reliability(Y, P, G, classes=NAMES, **kw),
        plot_history=plots.plot_history(HISTORY, **kw), plot_lr_find=plots.plot_lr_find([1e-5, 1e-4, 1e-3], [1., .5, .7], 1e-4, **kw),
        plot_decision_curve=plots.plot_decision_curve(Y, P, groups=G, classes=NAMES, n_boot=100, **kw),
        plot_prediction_grid=plots.plot_prediction_grid([np.eye(8)] * 5, ['a'] * 5, list('aabaa'), [.9] * 5, **kw),
        plot_subgroups=plots.plot_subgroups(subgroups(Y, P, dict(sex=np.where(G % 3, 'f', 'm')), G, n_boot=100), **kw),
        plot_intervals=plots.plot_intervals(pd.DataFrame(dict(who=['a', 'b'], value=.6, low=.5, high=.7)), 'who', **kw))

def words(fig):
    "All text of a figure"
    return ' '.join(t.get_text() for t in fig.findobj(matplotlib.text.Text))


@pytest.fixture(scope='module')
def figures(): return draw()


def test_every_plot_is_tried(figures):
    assert set(figures) == {n for n in vars(plots) if n.startswith('plot_')}
    assert all(isinstance(f, Figure) for f in figures.values())


@pytest.mark.parametrize('suffix', ['.png', '.pdf', '.svg'])
def test_figures_become_files(figures, tmp_path, suffix):
    for name, fig in figures.items():
        f = plots.save_figure(fig, tmp_path / 'deep' / f'{name}{suffix}', dpi=60)
        assert f.stat().st_size > 2000, name
        if suffix == '.png':
            with Image.open(f) as im: assert np.asarray(im.convert('L')).std() > 5, name          # something is drawn
    assert not [p for p in (tmp_path / 'deep').iterdir() if p.name.startswith('.')]


def test_the_same_figure_gives_the_same_file(tmp_path):
    a, b = (plots.save_figure(draw()['plot_roc'], tmp_path / f'{i}.png').read_bytes() for i in 'ab')
    assert a == b


def test_phantoms_say_so_in_every_figure(figures):
    for name, fig in draw(synthetic=True).items(): assert plots.PHANTOM_WORDS in words(fig), name
    for name, fig in figures.items(): assert plots.PHANTOM_WORDS not in words(fig), name


def test_counts_stand_in_the_titles(figures):
    for name in ('plot_confusion', 'plot_roc', 'plot_pr', 'plot_reliability'):
        assert '160 images' in words(figures[name]) and '80 patient groups' in words(figures[name]), name
    for name in ('plot_roc', 'plot_pr', 'plot_reliability', 'plot_decision_curve'):
        assert '80 other, 80 covid' in words(figures[name]), name
    assert '3 epochs in 2 stages' in words(figures['plot_history'])
    assert '5 images, 1 predicted wrongly' in words(figures['plot_prediction_grid'])
    assert 'covid: 80 images' in words(figures['plot_scores'])


def test_a_band_over_images_does_not_claim_patients():
    e = evaluate(Y, P, classes=NAMES, n_boot=100)
    for fig in (plots.plot_roc(e), plots.plot_pr(e), plots.plot_decision_curve(Y, P, n_boot=100)):
        assert 'over images' in words(fig) and 'patient' not in words(fig)


def test_what_is_drawn_is_what_was_measured(figures):
    e = evaluate(Y, P, groups=G, classes=NAMES, n_boot=200)
    ax = figures['plot_roc'].axes[0]
    curve = max((l for l in ax.lines), key=lambda l: len(l.get_xdata()))
    x, h = np.asarray(curve.get_xdata()), np.asarray(curve.get_ydata())
    assert (np.diff(x) * (h[1:] + h[:-1]) / 2).sum() == pytest.approx(e['auc'].value, abs=1e-3)
    point = [l for l in ax.lines if l.get_marker() == 'o'][0]
    assert (point.get_xdata()[0], point.get_ydata()[0]) == pytest.approx((e['fpr'].value, e['recall'].value))
    cells = [t.get_text() for t in figures['plot_confusion'].axes[0].texts]
    assert [int(c) for c in cells[::2]] == [v for row in e.confusion for v in row]
    bars = figures['plot_scores'].axes[0].patches
    assert sum(b.get_height() for b in bars if b.get_width() < .1) == (Y == 1).sum()


def test_several_classes(tmp_path):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 90)
    p = rng.dirichlet([1, 1, 1], 90) * .5 + .5 * np.eye(3)[y]
    e = evaluate(y, p, classes=('normal', 'bacteria', 'virus'), n_boot=100)
    for f in (plots.plot_confusion, plots.plot_roc, plots.plot_pr): assert 'virus' in words(f(e))
    plots.save_figure(plots.plot_scores(y, p, classes=('normal', 'bacteria', 'virus')), tmp_path / 's.png')


def test_matplotlib_is_left_alone():
    import matplotlib.pyplot as plt
    before = dict(matplotlib.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        draw()
    assert plt.get_fignums() == [] and dict(matplotlib.rcParams) == before


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path, figures):
    (tmp_path / 'file').write_text('x')
    with pytest.raises(RunError, match='cannot write'): plots.save_figure(figures['plot_roc'], tmp_path / 'file' / 'roc.png')
