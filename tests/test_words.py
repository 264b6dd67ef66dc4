"""The field's words: names that this library once used and no reader knows are gone, in code, prose, package and README."""
import json, re
from pathlib import Path
import pytest
from conftest import ROOT

WORDS = '''rival rivals rung rungs floor floors ladder ladders ledger ledgers gate gates strangers stranger versus smallnet film films
    judged nobody somebody whoever wolf coin coins provenance_floor pixel_floor floor_adjusted_auc above_provenance audit_run_'''.split()
NAMES = '''ReadPicture CostLoss RoundSpec RoundsRun KeyCheck KeyReport JudgedRun MarkerProbe SmallNet AuditRow LedgerError
    check_keys explain_key check_patient_key key_overlaps label_tells by_luck use_at few_errors power_words oracle_gap findable told_apart
    optimiser lr_find_it make_strangers change_films judge_gate fit_gate count_looks looks_words append_ledger read_ledger ledger_head
    small_net fit_small_net fit_floors best_floor keep_floors floor_gains pool_films ensemble_films probe_occlusion probe_markers
    probe_acquisition audit_groups audit_duplicates audit_facts audit_no_lung audit_headline audit_occlusion audit_markers audit_acquisition
    audit_source audit_probe audit_permutation audit_precision audit_threshold audit_calibration audit_use audit_subgroups audit_ladder
    audit_key audit_maps audit_gate read_rung judge_rung rung_floors rung_words read_ladder evaluate_on ladder_table show_ladder plot_ladder
    read_judged read_facts number_of show_number show_interval count_of list_rivals detectable_difference in_short find_banners power_table
    claim_items claim_counts judge_outside source_only_scores compare_calls'''.split()
OLD = re.compile(r'(?<!\w)(' + '|'.join(WORDS + NAMES) + r')(?!\w)', re.I)
HARMLESS = re.compile(r'\b(np|math|torch)\.floor\b|floor_divide')
# files and keys of run directories, recipes and bundles made before the words changed: they are still read, in these places
STILL_READ = json.loads((ROOT / 'tests/old_words_still_read.json').read_text())


def _texts(path):
    if path.suffix != '.ipynb': return path.read_text(encoding='utf-8')
    return '\n'.join(''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'])


def _files():
    yield from sorted(p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
    code = dict(covid_cxr=('*.py', '*.toml', '*.j2', '*.css'), tests=('*.py',), benchmarks=('*.py',), tools=('*.py',))
    for folder, kinds in code.items():
        for kind in kinds: yield from sorted((ROOT / folder).rglob(kind))
    yield from (ROOT / f for f in ('README.md', 'CONTRIBUTING.md', 'Makefile', 'settings.ini', 'setup.py'))


def old_words(path):
    allowed = set(STILL_READ.get(str(path.relative_to(ROOT)), []))
    text = HARMLESS.sub('', _texts(path))
    return sorted({m[1] for m in OLD.finditer(text)} - allowed)


FILES = [p for p in _files() if p != Path(__file__)]


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_fields_words(path): assert old_words(path) == []


def test_the_list_of_old_words_is_needed():
    for name, words in STILL_READ.items():
        text = _texts(ROOT / name)
        for w in words: assert re.search(rf'(?<!\w){w}(?!\w)', text), f'{name} no longer holds {w}: take it off the list'


def test_the_search_finds_what_it_looks_for():
    assert all(OLD.search(t) for t in ('the best rival', 'RUN/floors.csv', 'case.judged', 'Films')) and not OLD.search('flooring')
