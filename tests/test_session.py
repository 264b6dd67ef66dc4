"""A whole fastai session on our DataLoaders and Learner, as a person in a notebook would hold it."""
import numpy as np, pytest, torch
from conftest import python, small_table
from PIL import Image
from covid_cxr.core import RecipeError, WeightsError
from covid_cxr.data import cxr_augment, cxr_block, cxr_dls
from covid_cxr.learner import FrozenDecision, auc_score, cxr_learner, fit_stages, learner_info, predict_table


@pytest.fixture(scope='module')
def table(tmp_path_factory):
    "Sixteen phantom patients; the classes in the order of the alphabet would put the ill ones first"
    return small_table(tmp_path_factory.mktemp('session'), 16, ('other', 'covid'), first_valid=10)


@pytest.fixture(scope='module')
def dls(table): return cxr_dls(table, size=64, bs=8, classes=['other', 'covid'], device='cpu')


def test_a_fastai_session(dls, table, tmp_path, monkeypatch):
    import matplotlib.pyplot as plt
    import fastai.vision.learner                    # what fastai.vision.all brings for show_results and plot_top_losses
    from fastai.callback.tracker import SaveModelCallback
    from fastai.interpret import ClassificationInterpretation
    from fastai.learner import load_learner
    from fastai.metrics import F1Score, RocAucBinary
    from fastai.optimizer import ranger
    plt.switch_backend('Agg')
    torch.manual_seed(0)
    learn = cxr_learner(dls, 'cnn3', pretrained=False, metrics=[F1Score(), RocAucBinary()], cbs=SaveModelCallback(),
                        opt_func=ranger, lr=2e-3, path=tmp_path)
    assert learn.lr == 2e-3 and not learner_info(learn).pretrained
    dls.show_batch(max_n=4)
    found = learn.lr_find(num_it=20)
    assert 0 < found.valley < 10
    learn.fit_one_cycle(1, 1e-3)
    learn.fine_tune(1, 1e-3, freeze_epochs=1)
    assert learn.recorder.metric_names[2:6] == ['valid_loss', 'accuracy', 'auc', 'f1_score']
    learn.show_results(max_n=4)
    interpretation = ClassificationInterpretation.from_learner(learn)
    assert interpretation.confusion_matrix().sum() == len(dls.valid_ds)
    interpretation.plot_confusion_matrix()
    interpretation.plot_top_losses(4)
    interpretation.most_confused()
    probs, targets = learn.get_preds()
    assert probs.shape == (len(dls.valid_ds), 2) and len(targets) == len(probs)
    assert learn.tta(n=2)[0].shape == probs.shape
    row = table[table.split == 'valid'].iloc[0]
    picture = Image.open(row['path'])
    told = [learn.predict(x)[2][1].item() for x in (row['path'], open(row['path'], 'rb').read(), picture, np.asarray(picture))]
    assert np.ptp(told) < 1e-6 and abs(told[0] - predict_table(learn, table[table.image_id == row['image_id']])['prob_covid'][0]) < 1e-5
    assert learn.predict(row['path'])[0] in ('other', 'covid')
    learn.export(tmp_path / 'whole.pkl')
    assert abs(load_learner(tmp_path / 'whole.pkl').predict(picture)[2][1].item() - told[0]) < 1e-5
    learn.save('here')
    learn.load('here')
    plt.close('all')


def test_the_order_of_the_classes_travels_with_the_table(table, dls):
    from covid_cxr.table import label_for
    known = table.assign(finding=['Pneumonia/Viral/COVID-19' if c == 'covid' else 'No Finding' for c in table.label])
    labelled = label_for(known, 'covid_vs_other')
    assert list(cxr_dls(labelled, size=64, bs=8, device='cpu').vocab) == ['other', 'covid']
    assert list(cxr_dls(labelled.copy().query('split != "test"'), size=64, bs=8, device='cpu').vocab) == ['other', 'covid']


def test_words_that_disagree_are_refused(dls, tmp_path):
    with pytest.raises(WeightsError, match="pretrained=True means weights='imagenet'"): cxr_learner(dls, 'cnn3', 'none', pretrained=True)
    with pytest.raises(RecipeError, match='loss_func of your own'):
        cxr_learner(dls, 'cnn3', 'none', loss_func=torch.nn.CrossEntropyLoss(), label_smoothing=.1)


def test_own_loss_splitter_and_callbacks_are_used(dls, tmp_path):
    from fastai.callback.core import Callback
    seen = []

    class Count(Callback):
        def after_epoch(self): seen.append(self.epoch)

    whole, loss = (lambda m: [list(m.parameters())]), torch.nn.CrossEntropyLoss()
    learn = cxr_learner(dls, 'cnn3', 'none', loss_func=loss, splitter=whole, path=tmp_path)
    assert isinstance(learn.loss_func, torch.nn.CrossEntropyLoss)
    fit_stages(learn, [dict(epochs=2, lr=1e-3)], tmp_path / 'fit', log=lambda line: None, cbs=Count())
    assert seen == [0, 1] and len(learn.opt.hypers) == 1


@pytest.mark.parametrize('name, value', [('mixup', .4), ('cutmix', 1.)])
def test_mixed_images_train_with_every_loss(dls, tmp_path, name, value):
    from fastai.callback.mixup import CutMix, MixUp
    mix = dict(mixup=MixUp, cutmix=CutMix)[name](value)
    for more in (dict(label_smoothing=.1), dict(imbalance='weighted_loss'), dict(cost_matrix=[[1, 2], [3, 1]])):
        learn = cxr_learner(dls, 'cnn3', 'none', path=tmp_path, **more)
        history = fit_stages(learn, [dict(epochs=1, lr=1e-3)], tmp_path / f'{name}-{list(more)[0]}', log=lambda line: None, cbs=mix).history
        assert np.isfinite(history.train_loss).all()


def test_strong_augmentation_leaves_the_validation_alone(table):
    many = cxr_augment(rotate=10, zoom=1.15, zoom_out=.85, shift=.1, gamma=.3, erase=.5, lighting=.3)
    changed = cxr_dls(table, size=64, bs=8, classes=['other', 'covid'], device='cpu', augment=many)
    plain = cxr_dls(table, size=64, bs=8, classes=['other', 'covid'], device='cpu', augment=[])
    assert torch.allclose(torch.as_tensor(changed.valid.one_batch()[0]), torch.as_tensor(plain.valid.one_batch()[0]), atol=1e-4)
    assert not torch.equal(torch.as_tensor(changed.train.one_batch()[0]), torch.as_tensor(changed.train.one_batch()[0]))
    block = cxr_block(['other', 'covid'], size=64, augment=many)
    assert block.dataloaders(table[['path', 'label', 'split']], bs=8, device=torch.device('cpu')).vocab == ['other', 'covid']


ALL = '''
import matplotlib; matplotlib.use('Agg')
from covid_cxr.all import *
from PIL import Image
import tempfile
with tempfile.TemporaryDirectory() as d:
    rows = []
    for p in range(12):
        f = f'{d}/{p}.png'
        Image.fromarray(make_phantom(seed=1, patient=p, size=48, lesion=.6 * (p % 2)).image).save(f)
        rows.append(dict(path=f, image_id=str(p), patient=f'p{p}', finding=['No Finding', 'Pneumonia'][p % 2]))
    table = label_for(new_table(rows, 'phantom'), 'pneumonia_vs_normal')
    table = split_by_group(group_leaksafe(table, duplicates='exact'), test_pct=.25, valid_pct=.25, seed=1)
    dls = cxr_dls(table, size=48, bs=4, device='cpu')
    learn = cxr_learner(dls, 'cnn3', pretrained=False, metrics=error_rate, path=d)
    learn.fit_one_cycle(1, 1e-3)
    interp = ClassificationInterpretation.from_learner(learn)
    interp.plot_confusion_matrix()
    save_bundle(learn, f'{d}/bundle')
    print('VOCAB', list(dls.vocab), load_predictor(f'{d}/bundle').predict(rows[0]['path'], ood='off').label in dls.vocab)
'''


def test_one_import_serves_a_session(): assert "VOCAB ['normal', 'pneumonia'] True" in python(ALL)


def test_the_frozen_decision_answers_as_the_bundle_does(dls):
    logits = torch.tensor([[1., 0.], [0., 1.]])
    decides = FrozenDecision(torch.nn.CrossEntropyLoss(), .9)
    decides.loss.activation = lambda z: z.softmax(1)
    assert decides.decodes(decides.activation(logits)).tolist() == [0, 0]
    assert auc_score(logits.softmax(1), torch.tensor([0, 1])) == 1
