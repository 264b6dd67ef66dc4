"""Readers of `covid_cxr.sources`: the published files where they are present, and small trees with every quirk elsewhere."""
import csv, gzip, io, json, os, warnings
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from conftest import DATA, examples, needs_data
from covid_cxr.core import COLUMNS, FINDINGS, NUMERIC, SYNTHETIC, CxrError, SourceError, VocabularyError, used
from covid_cxr.reading import (FILE_MISSING, NO_FILE_NAMED, NOT_XRAY_CT, NOT_XRAY_VOLUME, ages_in_years, read_metadata,
                               unlisted_files)
from covid_cxr.sources import (SOURCES, Source, coronahack_overlap, list_sources, parse_kaggle_name, read_actualmed, read_coronahack,
                               read_covid_chestxray, read_covid_radiography, read_csv, read_effusion_folders, read_figure1, read_folder,
                               read_kaggle_pneumonia, read_nih, read_rsna, read_source, register_source)

COVID = 'Pneumonia/Viral/COVID-19'
REASONS = {str(r) for r in (NO_FILE_NAMED, FILE_MISSING, NOT_XRAY_CT, NOT_XRAY_VOLUME)}
NIH_HEAD = ('Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,'
            'OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]\n')
CORONA_HEAD = ',X_ray_image_name,Label,Dataset_type,Label_2_Virus_category,Label_1_Virus_category\n'


def plant(root, files):
    "Write a tree of {path: text or bytes}; an empty file stands for an image, because no reader opens one"
    for name, content in files.items():
        p = root / name
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_bytes(content if isinstance(content, bytes) else content.encode('utf-8'))
    return root


def check_contract(t):
    "What every reader promises about its table"
    assert list(t.columns[:len(COLUMNS)]) == list(COLUMNS) and list(t.index) == list(range(len(t)))
    assert t['image_id'].notna().all() and t['image_id'].is_unique
    assert t['image_id'].str.startswith(t['source'].iloc[0] + ':').all()
    assert set(t['finding'].dropna()) <= set(FINDINGS) and set(t['sex'].dropna()) <= {'M', 'F'}
    assert set(t['modality'].dropna()) <= {'X-ray', 'CT'}
    assert set(t['excluded'].dropna()) <= REASONS
    for c in NUMERIC: assert t[c].dtype == float
    for c in ('group', 'label', 'split'): assert t[c].isna().all(), f'{c} is not a reader\'s to fill'
    for c in (c for c in t if t[c].dtype == object): assert not (t[c] == '').any(), f'{c} holds an empty text instead of NaN'
    assert all(os.path.isfile(p) for p in used(t)['path'])


# --- the published files -------------------------------------------------------------------------------------------------

@needs_data
@pytest.mark.parametrize('date,rows,usable,pa,covid,todo,patients', [
    ('2020-03-15', 88, 70, 58, 35, 0, 34), ('2020-03-28', 146, 120, 92, 69, 0, 60), ('2020-04-10', 279, 226, 149, 104, 0, 101),
    ('2020-04-18', 338, 282, 190, 139, 0, 124), ('2020-06-15', 673, 579, 301, 217, 0, 197), ('2020-06-22', 751, 657, 313, 217, 12, 205),
    (None, 751, 657, 313, 217, 12, 205)])
def test_every_state_of_the_covid_set(date, rows, usable, pa, covid, todo, patients):
    t = read_covid_chestxray(DATA / 'covid-chestxray-dataset', metadata=date and DATA / f'covid-chestxray-metadata-history/{date}.csv')
    check_contract(t)
    front = used(t)[used(t)['view'] == 'PA']
    assert (len(t), len(used(t)), len(front)) == (rows, usable, pa)
    found = int((front['finding'] == COVID).sum()), int(front['finding'].isna().sum()), front['patient'].nunique()
    assert found == (covid, todo, patients)
    assert set(front['modality']) == {'X-ray'}
    on_disk, named = set(os.listdir(DATA / 'covid-chestxray-dataset/images')), {os.path.basename(p) for p in t['path']}
    assert set(t.attrs['files_without_row']) == on_disk - named


@needs_data
def test_june_2020_in_detail():
    t = read_covid_chestxray(DATA)                                   # the folder above it
    assert t['excluded'].value_counts().to_dict() == {str(NOT_XRAY_CT): 63, str(NOT_XRAY_VOLUME): 21, str(FILE_MISSING): 10}
    assert (t['modality'] == 'CT').sum() == 84 and t['view'].isna().sum() == 39 and t['finding'].isna().sum() == 78
    assert (t['view'] == 'L').sum() == 58 and (t['modality'][t['finding_raw'] == 'todo'] == 'X-ray').sum() == 78
    assert t['age_years'].isna().sum() == 151 and t['age_years'].min() == 12 and t['age_years'].max() == 94
    assert t['offset_days'].isna().sum() == 187 and t['offset_days'].min() == -360 and (t['offset_raw'] == '?').sum() == 4
    assert t['licence'].isna().sum() == 240 and (t['survival'].isin(['Y', 'N']) | t['survival'].isna()).all()
    assert 'Not visible' not in set(t['intubated']) and 'Would have been stated' not in set(t['went_icu'])
    twice = t[t['path'].duplicated(keep=False)]
    assert len(twice) == 10 and twice['image_id'].str.endswith('#2').sum() == 5 and twice.groupby('path')['patient'].nunique().eq(2).all()
    assert t['mask'].notna().sum() == 202 and all(os.path.isfile(m) for m in t['mask'].dropna())
    assert t['host'].value_counts().index[0] == 'radiopaedia.org'
    assert {'covid_chestxray:331a', 'covid_chestxray:331b'} <= set(t['patient'])
    assert unlisted_files(t) == [] == t.attrs['files_without_row']


@needs_data
def test_kaggle_agrees_with_the_official_split_on_every_file():
    t = read_kaggle_pneumonia(DATA / 'chest-xray-pneumonia')
    check_contract(t)
    key = pd.read_csv(DATA / 'kaggle-official-split.csv', dtype=str)
    both = t.assign(file=t['image_id'].str.split(':').str[1]).merge(key, on='file', suffixes=('', '_key'), validate='one_to_one')
    assert len(both) == len(t) == len(key) == len(used(t)) == 5856
    assert (both['official_split'] == both['official_split_key'].replace('val', 'valid')).all()
    assert (both['kind'] == both['kind_key']).all()
    # the same partition
    assert both.groupby('patient')['group_key'].nunique().max() == 1 == both.groupby('group_key')['patient'].nunique().max()
    assert both['patient'].nunique() == 4097
    # no patient in two splits
    assert both.groupby('patient')['official_split'].nunique().max() == 1
    # the tempting, wrong patient id
    bare = both['file'].str.extract(r'^(person\d+)_')[0]
    assert len(set(bare[both['official_split'] == 'train'].dropna()) & set(bare[both['official_split'] == 'test'].dropna())) == 170
    assert t['view'].isna().all() and set(t['licence']) == {'CC BY 4.0'} and t['patient'].notna().all()
    assert t['finding'].value_counts().to_dict() == {'Pneumonia/Bacterial': 2780, 'No Finding': 1583, 'Pneumonia/Viral': 1493}


@needs_data
def test_kaggle_train_part_alone():
    t = read_kaggle_pneumonia(DATA / 'chest-xray-pneumonia-512')
    check_contract(t)
    assert len(t) == 500 and set(t['official_split']) == {'train'} and (t['finding'] == 'No Finding').sum() == 250


@needs_data
def test_nih_whole_table():
    t = read_nih(DATA / 'nih-chest-xrays', csv='nih.csv.gz', files='ignore')
    assert len(t) == len(used(t)) == 112_120 and t['patient'].nunique() == 30_805 and t['image_id'].is_unique
    assert t['view'].value_counts().to_dict() == {'PA': 67_310, 'AP': 44_810}
    effusion = t['findings'].str.split('|').map(lambda f: 'Effusion' in f)
    assert effusion.sum() == 13_317 and (t['findings'] == 'Effusion').sum() == 3_955 and (t['findings'] == 'No Finding').sum() == 60_361
    assert round(100 * (t['view'][effusion] == 'AP').mean(), 1) == 50.5
    assert round(100 * (t['view'][t['finding'] == 'No Finding'] == 'AP').mean(), 1) == 34.9
    assert t['age_years'].notna().all() and (t['age_years'].min(), t['age_years'].max()) == (0, 95) and (t['age_years'] < 18).sum() == 5_402
    assert (t['finding'] == t['findings'].str.split('|').str[0]).all()


@needs_data
def test_nih_cuts():
    t = read_nih(DATA)
    check_contract(t)
    assert len(t) == len(used(t)) == 746
    assert (t['findings'] == 'No Finding').sum() == 393 and t['findings'].str.contains('Effusion').sum() == 65
    small = read_nih(DATA / 'nih-chest-xrays-512')
    assert len(used(small)) == 122 and set(small['view']) == {'PA'} and set(small['finding']) == {'No Finding'}
    assert small['age_years'].min() == 7
    rest = read_nih(DATA / 'nih-chest-xrays', csv='nih.csv.gz')
    assert rest['excluded'].value_counts().to_dict() == {str(FILE_MISSING): 112_120 - 746}


@needs_data
def test_coronahack_is_kaggle_plus_covid():
    kaggle, covid = read_kaggle_pneumonia(DATA), read_covid_chestxray(DATA)
    t = read_coronahack(DATA / 'coronahack', roots=[DATA / 'chest-xray-pneumonia', DATA / 'covid-chestxray-dataset/images'])
    check_contract(t)
    assert len(t) == 6197 and not t['contradicts'].any() and t['findings'].notna().all()
    assert t['official_split'].value_counts().to_dict() == {'train': 5553, 'test': 644}
    assert t['finding'].value_counts().to_dict() == {'Pneumonia/Bacterial': 2772, 'No Finding': 1576, 'Pneumonia/Viral': 1493, COVID: 345,
                                                     'Pneumonia/Bacterial/Streptococcus': 5, 'Pneumonia/Viral/SARS': 4,
                                                     'Pneumonia/Stress-Smoking': 2}
    o = coronahack_overlap(t, [kaggle, covid]).set_index('other')
    assert o.loc['kaggle_pneumonia', ['shared', 'shared_train', 'shared_test']].tolist() == [5840, 5216, 624]
    assert o.loc['covid_chestxray', 'shared'] == 70
    assert t['same_as'].isna().sum() == 287                                                     # the fork's own additions
    ours = t['same_as'].dropna()
    assert ours.isin(set(kaggle['image_id']) | set(covid['image_id'])).all()                    # every claim of origin holds
    known = t.dropna(subset=['same_as']).merge(pd.concat([kaggle, covid]), left_on='same_as', right_on='image_id', suffixes=('', '_there'))
    assert len(known) == 5910 and (known['patient'] == known['patient_there']).all()            # the groups join
    mild = known[known['same_as'].str.startswith('kaggle')]
    assert (mild['finding'] == mild['finding_there']).all() and (mild['official_split'] == mild['official_split_there']).all()
    assert used(t).shape[0] == 5840 + 67 and set(used(t)['licence'].dropna()) == {'CC BY 4.0'}
    through = read_source('coronahack', DATA, csv='coronahack/Chest_xray_Corona_Metadata.csv',
                          roots=['chest-xray-pneumonia', 'covid-chestxray-dataset/images'])
    pd.testing.assert_frame_equal(through, t)


# --- one tree per source, with its quirks --------------------------------------------------------------------------------

@pytest.fixture
def trees(tmp_path):
    "A small tree of every source, and how to read it"
    uid = '1.2.840.113564.1722810162.20200320112920531100.1203801020003'
    agchung = 'patientid,offset,sex,age,finding,survival,temperature,pO2 saturation,view,modality,{}artifacts/distortion,notes\n'
    plant(tmp_path / 'covid-chestxray-dataset', {
        'metadata.csv': 'patientid,offset,sex,age,finding,view,modality,folder,filename,url,license,\n'
                        '2,0,M,65,COVID-19,PA,X-ray,images,a.jpeg,https://www.x.org/1,CC BY,\n'
                        '3,,,,todo,AP,X-ray,images,gone.png,,,\n4,,,,COVID-19,Axial,CT,volumes,v.nii.gz,,,\n', 'images/a.jpeg': ''})
    plant(tmp_path / 'kaggle/chest_xray', {'train/NORMAL/IM-0115-0001.jpeg': '', 'train/PNEUMONIA/person1_virus_6.jpeg': '',
                                           'test/PNEUMONIA/person1_bacteria_1.jpeg': ''})
    plant(tmp_path / 'nih', {'Data_Entry_2017_v2020.csv': NIH_HEAD + '00000001_000.png,Cardiomegaly|Effusion,0,1,58,M,PA,2,2,.1,.1\n',
                             'images/00000001_000.png': ''})
    plant(tmp_path / 'corona',
          {'Chest_xray_Corona_Metadata.csv': CORONA_HEAD + '0,IM-0115-0001.jpeg,Normal,TRAIN,,\n1,x.png,Pnemonia,TEST,SARS,Virus\n',
           'train/IM-0115-0001.jpeg': ''})
    plant(tmp_path / 'fig1', {'metadata.csv': (agchung.format('') + 'COVID-00003a,8,M,50+,,,39°,90,AP erect,X-ray,,\n').encode('latin-1'),
                              'images/COVID-00003a.jpg': ''})
    plant(tmp_path / 'actual', {'metadata.csv': agchung.format('imagename,') + f'ANON1,,,,No finding,,,,PA,X-ray,DX.{uid}.png,,\n',
                                f'images/DX.{uid}.png': ''})
    plant(tmp_path / 'rsna', {'stage_2_train_labels.csv': 'patientId,x,y,width,height,Target\na,1,1,1,1,1\na,2,2,2,2,1\nb,,,,,0\n',
                              'stage_2_train_images/a.dcm': ''})
    plant(tmp_path / 'radio', {'COVID/images/COVID-1.png': '', 'COVID/masks/COVID-1.png': '', 'Normal/images/Normal-1.png': ''})
    plant(tmp_path / 'eff', {'effusion/00000061_012.png': '', 'nofinding/00000099_000.png': ''})
    plant(tmp_path / 'folder', {'covid/1.png': '', 'normal/2.png': ''})
    plant(tmp_path / 'csv', {'t.csv': 'f,d\n1.png,covid\n2.png,normal\n', '1.png': ''})
    return {'covid_chestxray': (tmp_path, {}), 'kaggle_pneumonia': (tmp_path / 'kaggle', {}), 'nih': (tmp_path / 'nih', {}),
            'coronahack': (tmp_path / 'corona', {}),
            'figure1': (tmp_path / 'fig1', {}), 'actualmed': (tmp_path / 'actual', {}), 'rsna': (tmp_path / 'rsna', {}),
            'covid_radiography': (tmp_path / 'radio', {}),
            'effusion_folders': (tmp_path / 'eff', {}), 'folder': (tmp_path / 'folder', {}),
            'csv': (tmp_path / 'csv', dict(csv='t.csv', columns=dict(path='f', finding='d')))}


ROWS = dict(covid_chestxray=3, kaggle_pneumonia=3, nih=1, coronahack=2, figure1=1, actualmed=1, rsna=2, covid_radiography=2,
            effusion_folders=2, folder=2, csv=2)


@pytest.mark.parametrize('name', sorted(ROWS))
def test_every_source_keeps_the_contract(name, trees):
    root, options = trees[name]
    t = read_source(name, root, **options)
    check_contract(t)
    assert len(t) == ROWS[name] and set(t['source']) == {name}
    s = SOURCES[name]
    if name not in ('folder', 'csv'):
        if not s.records_view: assert t['view'].isna().all()
        if not s.records_patient: assert t['patient'].isna().all()
        if not s.records_age: assert t['age_years'].isna().all() and t['sex'].isna().all()


@pytest.mark.parametrize('name', sorted(ROWS))
def test_a_synthetic_tree_says_so_in_every_row(name, trees):
    root, options = trees[name]
    (root / 'SYNTHETIC.txt').write_text('made by covid_cxr.phantom')
    assert set(read_source(name, root, **options)['licence']) == {SYNTHETIC}


@pytest.mark.parametrize('name', sorted(set(ROWS) - {'csv'}))
def test_a_folder_that_is_not_there_is_named(name, tmp_path):
    with pytest.raises(SourceError, match='nowhere'): read_source(name, tmp_path / 'nowhere')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(SourceError, match='empty'): read_source(name, tmp_path / 'empty')


def test_no_source_is_left_off_this_list():
    assert set(ROWS) == set(SOURCES) and list(list_sources()['name']) == list(SOURCES)


# --- metadata as people save it ------------------------------------------------------------------------------------------

CELL = st.text(st.characters(exclude_categories=('Cs', 'Cc')), max_size=12)


@settings(max_examples=examples(60), deadline=None)
@given(rows=st.lists(st.lists(CELL, min_size=3, max_size=3), max_size=5), sep=st.sampled_from(',;\t'), bom=st.booleans(),
       crlf=st.booleans(), zipped=st.booleans())
def test_read_metadata_gives_back_what_a_spreadsheet_wrote(tmp_path_factory, rows, sep, bom, crlf, zipped):
    out = io.StringIO(newline='')
    w = csv.writer(out, delimiter=sep, lineterminator='\r\n' if crlf else '\n')
    w.writerow([' Patientid', 'Finding ', 'x y'])
    w.writerows(rows)
    raw = out.getvalue().encode('utf-8-sig' if bom else 'utf-8')
    p = tmp_path_factory.mktemp('m') / ('m.csv.gz' if zipped else 'm.csv')
    p.write_bytes(gzip.compress(raw) if zipped else raw)
    t = read_metadata(p, needed=('patientid', 'finding', 'x y'))
    want = [[c.strip() for c in r] for r in rows if any(c.strip() for c in r)]
    assert [['' if pd.isna(c) else c for c in r] for r in t.values.tolist()] == want


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'cp1252', 'latin-1'])
def test_letters_of_every_era(tmp_path, encoding):
    p = tmp_path / 'm.csv'
    p.write_bytes('patientid,notes\n1,Köln 39° naïve\xa0x\n'.encode(encoding))
    assert read_metadata(p)['notes'][0] == 'Köln 39° naïve\xa0x'


def test_a_broken_table_is_refused_by_row(tmp_path):
    p = plant(tmp_path, {'m.csv': 'a,b\n1,2\n3,4,5\n'}) / 'm.csv'
    with pytest.raises(SourceError, match='row 3 has 3 fields'): read_metadata(p)
    plant(tmp_path, {'m.csv': 'a,b\n1,"' + 'x' * 200_000 + '\n'})
    with pytest.raises(SourceError, match='quotes'): read_metadata(p)


def test_trailing_nameless_columns_and_repeated_names(tmp_path):
    p = plant(tmp_path, {'m.csv': 'a,b,a,,Unnamed: 4\n1,2,1,spill,spill\n'}) / 'm.csv'
    assert read_metadata(p).to_dict('list') == dict(a=['1'], b=['2'])
    plant(tmp_path, {'m.csv': 'a,b,A \n1,2,1\n1,2,3\n'})
    with pytest.raises(SourceError, match="2 columns 'a' that differ, first in row 3"): read_metadata(p)


@pytest.mark.parametrize('word,years', [('65', 65), ('0', 0), ('120', 120), ('121', None), ('061Y', 61), ('018M', 1.5), ('000', 0),
                                        ('early 40s', 42), ('mid 50s', 55),
                                        ('late 60s', 68), ('Mid-50s', 55), ('30s', 35), ('50+', None), ('67+', None), ('?', None),
                                        ('fifty', None), (' 7 ', 7)])
def test_ages(word, years):
    got = ages_in_years([word])
    assert got.shape == (1,) and (np.isnan(got[0]) if years is None else got[0] == years)


# --- the COVID set -------------------------------------------------------------------------------------------------------

FINAL = [
    'Pneumonia', 'Pneumonia/Viral/COVID-19', 'Pneumonia/Viral/SARS', 'Pneumonia/Viral/MERS-CoV', 'Pneumonia/Viral/Influenza',
    'Pneumonia/Viral/Influenza/H1N1', 'Pneumonia/Viral/Herpes ', 'Pneumonia/Viral/Varicella', 'Pneumonia/Bacterial',
    *(f'Pneumonia/Bacterial/{b}' for b in ('Streptococcus', 'Klebsiella', 'Chlamydophila', 'Legionella', 'E.Coli', 'Mycoplasma',
                                           'Nocardia', 'Staphylococcus/MRSA')),
    'Pneumonia/Fungal/Pneumocystis', 'Pneumonia/Fungal/Aspergillosis', 'Pneumonia/Lipoid',
    'Pneumonia/Aspiration', 'Tuberculosis', 'No Finding']


def test_the_last_schema_of_the_covid_set(tmp_path):
    head = ('patientid,offset,sex,age,finding,RT_PCR_positive,survival,intubated,intubation_present,went_icu,in_icu,'
            'needed_supplemental_O2,extubated,temperature,pO2_saturation,'
            'leukocyte_count,neutrophil_count,lymphocyte_count,view,modality,date,location,folder,'
            'filename,doi,url,license,clinical_notes,other_notes,\n')
    rows = ''.join(f'{i},?,M,30,{f},{"Y" if i else "Unclear"},,Not visible,,Would have been stated,,,,,,,,,'
                   f'AP semi erect,X-ray,2020,,images,{i}.png,,,,,,\n' for i, f in enumerate([*FINAL, 'todo', 'Unknown']))
    root = plant(tmp_path, {'metadata.csv': head + rows, 'images/0.png': ''})
    t = read_covid_chestxray(root, files='ignore')
    assert list(t['finding'][:-2]) == [f.strip() for f in FINAL] and t['finding'][-2:].isna().all()
    assert list(t['rt_pcr'][:2]) == ['Unclear', 'Y'] and t['intubated'].isna().all() and t['went_icu'].isna().all()
    assert t['offset_days'].isna().all()
    assert set(t['view']) == {'AP Erect'}


@pytest.mark.parametrize('header', ["Patientid,offset,sex,age,finding,year, filename, url,",
                                    'Patientid,offset,sex,age,finding,survival,date,location, filename, url,'])
def test_the_first_weeks_had_no_view(tmp_path, header):
    "Then it is not known which rows are PA, and the reader says which column is missing instead of guessing"
    plant(tmp_path, {'metadata.csv': header + '\n', 'images/x.png': ''})
    with pytest.raises(SourceError, match='no column view'): read_covid_chestxray(tmp_path)


@pytest.mark.parametrize('modality,view,kind', [('', 'PA', 'X-ray'), ('', 'CT', 'CT'), ('', 'Coronal CT', 'CT'), ('', 'X-ray', 'X-ray'),
                                                ('', '?', None), ('X-ray', '', 'X-ray'),
                                                ('CT', '', 'CT'), ('X-ray', 'Axial', 'CT'), ('CT', 'PA', 'CT'), (None, 'Axial', 'CT'),
                                                (None, 'L', 'X-ray')])
def test_ct_is_found_wherever_it_is_said(tmp_path, modality, view, kind):
    columns = 'patientid,finding,view,filename' + ('' if modality is None else ',modality')
    plant(tmp_path, {'metadata.csv': f'{columns}\n1,COVID-19,{view},a.png{"" if modality is None else "," + modality}\n',
                     'images/a.png': ''})
    t = read_covid_chestxray(tmp_path)
    assert (t['modality'][0] if kind else pd.isna(t['modality'][0])) == (kind or True)
    assert t['excluded'][0] == str(NOT_XRAY_CT) if kind == 'CT' else pd.isna(t['excluded'][0])


def test_names_that_nearly_fit(tmp_path):
    names = ['a.png ', 'B.PNG', 'c', 'd', 'e.png']
    plant(tmp_path, {'metadata.csv': 'patientid,finding,view,filename\n' + ''.join(f'1,COVID-19,PA,{n}\n' for n in names),
                     **{f'images/{n}': '' for n in ('a.png', 'b.png', 'c.jpeg', 'd.jpg', 'd.png', 'e.jpg', '.DS_Store', 'Thumbs.db')}})
    t = read_covid_chestxray(tmp_path)
    # d fits two files, e another format: both are missing
    assert [os.path.basename(p) for p in used(t)['path']] == ['a.png', 'b.png', 'c.jpeg']
    assert list(t['excluded'][3:]) == [str(FILE_MISSING)] * 2
    assert t.attrs['files_without_row'] == ['d.jpg', 'd.png', 'e.jpg']


def test_covid_errors_name_what_is_wrong(tmp_path):
    plant(tmp_path, {'images/a.png': ''})
    with pytest.raises(SourceError, match='holds no metadata.csv'): read_covid_chestxray(tmp_path)
    with pytest.raises(SourceError, match='gone.csv'): read_covid_chestxray(tmp_path, metadata='gone.csv')
    plant(tmp_path, {'metadata.csv': 'patientid,finding,view,filename\n1,Y,PA,a.png\n2,COVID-19,oblique,a.png\n'})
    with pytest.raises(VocabularyError, match=r"'oblique' \(1\)"): read_covid_chestxray(tmp_path)
    plant(tmp_path, {'metadata.csv': 'patientid,finding,view,filename\n1,Y,PA,a.png\n2,Y,PA,a.png\n3,Covd,PA,a.png\n'})
    with pytest.raises(VocabularyError, match=r"'Y' \(2\), 'Covd' \(1\)"): read_covid_chestxray(tmp_path)
    plant(tmp_path / 'bare', {'metadata.csv': 'patientid,finding,view,filename\n1,COVID-19,PA,a.png\n'})
    with pytest.raises(SourceError, match="files='ignore'"): read_covid_chestxray(tmp_path / 'bare')
    assert len(used(read_covid_chestxray(tmp_path / 'bare', files='ignore'))) == 1


def test_a_zip_from_github_is_found_by_its_name(tmp_path):
    plant(tmp_path / 'covid-chestxray-dataset-master', {'metadata.csv': 'patientid,finding,view,filename\n1,COVID-19,PA,a.png\n',
                                                        'images/a.png': ''})
    assert len(used(read_covid_chestxray(tmp_path))) == 1


# --- Kaggle ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name,said', [
    ('person23_bacteria_78.jpeg', ('bacteria', 'bacteria-person23')), ('person23_virus_56.jpeg', ('virus', 'virus-person23')),
    ('PERSON23_VIRUS_56.JPEG', ('virus', 'virus-person23')),
    ('person447_virus_921_1.jpeg', ('virus', 'virus-person447')), ('IM-0439-0001-0002.jpeg', ('normal', 'IM-0439')),
    ('IM-0439-0001.jpeg', ('normal', 'IM-0439')),
    ('NORMAL2-IM-0439-0001.jpeg', ('normal', 'NORMAL2-IM-0439')), ('NORMAL2-IM-0439-0001-0001.jpg', ('normal', 'NORMAL2-IM-0439')),
    ('person23.jpeg', None), ('person23_bacteria_78.gif', None), ('copy of IM-0439-0001.jpeg', None), ('', None)])
def test_kaggle_names(name, said): assert parse_kaggle_name(name) == said


@pytest.mark.parametrize('below', ['', 'chest_xray', 'chest_xray/chest_xray', 'chest-xray-pneumonia/chest_xray'])
def test_kaggle_however_the_archive_was_unpacked(tmp_path, below):
    files = {f'{below}/train/NORMAL/IM-0115-0001.jpeg': '', f'{below}/test/PNEUMONIA/person1_virus_6.jpeg': '',
             f'{below}/VAL/Pneumonia/person1946_bacteria_4874.JPEG': '',
             '__MACOSX/chest_xray/train/NORMAL/._IM-0115-0001.jpeg': '', f'{below}/train/NORMAL/._IM-0115-0001.jpeg': '',
             f'{below}/train/NORMAL/.DS_Store': '',
             f'{below}/train/NORMAL/Thumbs.db': '', f'{below}/train/readme.txt': ''}
    plant(tmp_path, {k.lstrip('/'): v for k, v in files.items()})
    t = read_kaggle_pneumonia(tmp_path)
    check_contract(t)
    assert sorted(zip(t['official_split'], t['kind'])) == [('test', 'virus'), ('train', 'normal'), ('valid', 'bacteria')]


def test_kaggle_refuses_what_is_not_its_own(tmp_path):
    plant(tmp_path, {'train/NORMAL/IM-0115-0001.jpeg': '', 'train/COVID/person1_virus_6.jpeg': '', 'train/NORMAL/mine.jpeg': ''})
    with pytest.raises(SourceError, match='2 images .*covid/person1_virus_6.jpeg, normal/mine.jpeg.*read_folder'):
        read_kaggle_pneumonia(tmp_path)


# --- NIH, RSNA, and what was cut from them -----------------------------------------------------------------------------------

def test_nih_folders_lists_and_old_ages(tmp_path):
    plant(tmp_path, {'Data_Entry_2017.csv': NIH_HEAD.replace('y]', 'y],') +
                     '00000001_000.png,Effusion|Edema,0,1,058Y,M,PA,2,2,.1,.1,\n'
                     '00000002_000.png,No Finding,0,2,414Y,F,AP,2,2,.1,.1,\n'
                                            '00000003_000.png,Hernia,0,3,003M,F,AP,2,2,.1,.1,\n',
                     'images_001/images/00000001_000.png': '', 'images_012/images/00000002_000.png': '',
                     'test_list.txt': '00000002_000.png\n'})
    t = read_nih(tmp_path)
    check_contract(t)
    assert list(t['findings']) == ['Effusion|Edema', 'No Finding', 'Hernia'] and t['finding'][0] == 'Effusion'
    assert list(t['age_years'][[0, 2]]) == [58, .25] and np.isnan(t['age_years'][1])
    assert list(t['official_split'].fillna('-')) == ['-', 'test', '-'] and t['excluded'][2] == str(FILE_MISSING)


def test_nih_lists_all_unknown_labels(tmp_path):
    plant(tmp_path, {'Data_Entry_2017_v2020.csv': NIH_HEAD +
                     '1_0.png,Effusion|Wart,0,1,5,M,PA,2,2,.1,.1\n'
                     '2_0.png,Wart|Mole,0,1,5,M,PA,2,2,.1,.1\n'})
    with pytest.raises(VocabularyError, match=r"'Wart' \(2\), 'Mole' \(1\)"): read_nih(tmp_path, files='ignore')


def test_rsna_headers_and_mapping(tmp_path):
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    plant(tmp_path, {'stage_2_train_labels.csv': 'patientId,x,y,width,height,Target\na,1,1,1,1,1\na,2,2,2,2,1\nb,,,,,0\nc,,,,,0\n',
                     'stage_2_detailed_class_info.csv': 'patientId,class\na,Lung Opacity\na,Lung Opacity\n'
                                                        'b,No Lung Opacity / Not Normal\nc,Normal\n',
                     'pneumonia-challenge-dataset-mappings_2018.json': json.dumps([dict(subset_img_id='a', img_id='00000061_012.png'),
                                                                                   dict(subset_img_id='b', img_id='00000061_015.png')]),
                     'stage_2_train_images/keep': ''})
    for name, view, age, sex in (('a', 'AP', '51', 'F'), ('b', 'PA', '155', 'M')):           # ages as RSNA writes them
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = '1.2.840.10008.5.1.4.1.1.7', '1.2.3'
        ds = FileDataset('x', {}, file_meta=meta, preamble=b'\0' * 128)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', UserWarning)
            ds.ViewPosition, ds.PatientAge, ds.PatientSex = view, age, sex
            ds.SOPClassUID, ds.SOPInstanceUID = '1.2.840.10008.5.1.4.1.1.7', '1.2.3'
            pydicom.dcmwrite(tmp_path / f'stage_2_train_images/{name}.dcm', ds)
    t = read_rsna(tmp_path, headers=True)
    check_contract(t)
    assert list(t['view'].fillna('-')) == ['AP', 'PA', '-'] and list(t['sex'].fillna('-')) == ['F', 'M', '-'] and t['age_years'][0] == 51
    assert np.isnan(t['age_years'][1])
    assert list(t['finding']) == ['Lung Opacity', 'Other Abnormality', 'No Finding'] and list(t['boxes']) == [2, 0, 0]
    assert list(t['patient'].fillna('-')) == ['nih:61', 'nih:61', '-'] and t['same_as'][0] == 'nih:00000061_012.png'
    assert t['excluded'][2] == str(FILE_MISSING)


def test_radiography_pages(tmp_path):
    plant(tmp_path, {'COVID/images/COVID-1.png': '', 'Normal/images/Normal-1.png': ''})
    assert read_covid_radiography(tmp_path, urls=True)['url'].isna().all()          # no sheet, no page
    try: pd.DataFrame({'FILE NAME': ['COVID-1'], 'URL': ['https://sirm.org']}).to_excel(tmp_path / 'COVID.metadata.xlsx', index=False)
    except ImportError:
        plant(tmp_path, {'COVID.metadata.xlsx': ''})
        with pytest.raises(SourceError, match='openpyxl'): read_covid_radiography(tmp_path, urls=True)
    else: assert list(read_covid_radiography(tmp_path, urls=True)['url'].fillna('-')) == ['https://sirm.org', '-']
    assert len(read_covid_radiography(tmp_path)) == 2


def test_effusion_names_lead_to_nih_patients(tmp_path):
    plant(tmp_path, {'CXR_data/Effusion/00000061_012.png': '', 'CXR_data/nofinding/deep/00000061_015.png': '',
                     'CXR_data/nofinding/other.png': ''})
    t = read_effusion_folders(tmp_path)
    assert dict(zip(t['image_id'].str.split(':').str[1], t['patient'].fillna('-'))) == {'00000061_012.png': 'nih:61',
                                                                                        '00000061_015.png': 'nih:61', 'other.png': '-'}
    assert t['finding'].value_counts().to_dict() == {'No Finding': 2, 'Effusion': 1} and t['view'].isna().all()


# --- Figure1 and Actualmed -----------------------------------------------------------------------------------------------------

def test_figure1_patients_and_ages(trees):
    t = read_figure1(trees['figure1'][0])
    assert t['patient'][0] == 'figure1:COVID-00003' and np.isnan(t['age_years'][0]) and t['age_raw'][0] == '50+'
    assert t['view'][0] == 'AP Erect' and t['offset_days'][0] == 8


def test_actualmed_device_and_day(trees):
    t = read_actualmed(trees['actualmed'][0])
    assert t['device'][0] == 'DX.1.2.840.113564.1722810162.1203801020003' and t['date'][0] == '2020-03-20'
    assert t['finding'][0] == 'No Finding' and t['patient'][0] == 'actualmed:ANON1'


# --- CoronaHack ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name,label,agent,cause,finding', [
    ('a.jpg', 'Normal', '', '', 'No Finding'), ('a.jpg', 'Pnemonia', '', '', 'Pneumonia'),
    ('a.jpg', 'Pnemonia', '', 'Virus', 'Pneumonia/Viral'),
    ('a.jpg', 'Pnemonia', 'COVID-19', 'Virus', COVID), ('a.jpg', 'Pnemonia', 'Streptococcus', 'bacteria',
                                                        'Pneumonia/Bacterial/Streptococcus'),
    ('a.jpg', 'Pnemonia', 'ARDS', 'Stress-Smoking', 'Pneumonia/Stress-Smoking'), ('a.jpg', '', '', '', None),
    ('a.jpg', 'Normal', 'COVID-19', 'Virus', 'contradiction'), ('a.jpg', 'Pnemonia', 'SARS', 'bacteria', 'contradiction'),
    ('a.jpg', '', '', 'Virus', 'contradiction'),
    ('person1_virus_6.jpeg', 'Pnemonia', '', 'bacteria', 'contradiction'), ('IM-0115-0001.jpeg', 'Pnemonia', '', '', 'contradiction'),
    ('person1_virus_6.jpeg', 'Normal', '', '', 'contradiction'), ('person1_virus_6.jpeg', 'Pnemonia', '', '', 'Pneumonia')])
def test_coronahack_words(tmp_path, name, label, agent, cause, finding):
    plant(tmp_path, {'Chest_xray_Corona_Metadata.csv': CORONA_HEAD + f'0,{name},{label},TRAIN,{agent},{cause}\n'})
    t = read_coronahack(tmp_path)
    assert bool(t['contradicts'][0]) == (finding == 'contradiction')
    assert pd.isna(t['finding'][0]) if finding in (None, 'contradiction') else t['finding'][0] == finding
    assert t['same_as'][0] == (f'kaggle_pneumonia:{name}' if parse_kaggle_name(name) else f'covid_chestxray:{name}')


def test_coronahack_takes_a_covid_patient_only_when_there_is_one(tmp_path):
    plant(tmp_path / 'covid',
          {'metadata.csv': 'Patientid,finding,view,filename\n7,COVID-19,PA,a.jpg\n8,COVID-19,PA,twice.jpg\n9,COVID-19,PA,twice.jpg\n',
           'images/a.jpg': '', 'images/twice.jpg': ''})
    plant(tmp_path / 'ch',
          {'Chest_xray_Corona_Metadata.csv': CORONA_HEAD +
           '0,a.jpg,Pnemonia,TRAIN,COVID-19,Virus\n1,twice.jpg,Pnemonia,TRAIN,COVID-19,Virus\n'
           '2,COVID19_3.jpg,Pnemonia,TEST,COVID-19,Virus\n'})
    t = read_coronahack(tmp_path / 'ch', roots=tmp_path / 'covid/images')
    assert list(t['patient'].fillna('-')) == ['covid_chestxray:7', '-', '-'] and len(used(t)) == 2 and pd.isna(t['same_as'][2])
    assert read_coronahack(tmp_path / 'ch')['patient'].isna().all()


# --- one's own -------------------------------------------------------------------------------------------------------------------

def test_folder_splits_and_patients(tmp_path):
    plant(tmp_path, {'train/Covid/p1_a.png': '', 'train/Covid/p1_b.PNG': '', 'val/normal/p2.dcm': '', 'val/normal/notes.txt': '',
                     'val/normal/.hidden.png': ''})
    t = read_folder(tmp_path, patient=r'(p\d)', view='AP', licence='internal', source='mine')
    check_contract(t)
    assert list(t['official_split']) == ['train', 'train', 'valid'] and list(t['patient']) == ['mine:p1', 'mine:p1', 'mine:p2']
    assert set(t['view']) == {'AP'} and set(t['licence']) == {'internal'}
    with pytest.raises(VocabularyError, match='oblique'): read_folder(tmp_path, view='oblique')


def test_csv_of_a_hospital(tmp_path):
    text = ('﻿Datei;Fall;Befund;Alter;Tag\r\n' 'a/1.png;1;Gesund;40;3\r\n' 'a/2.png;1;unklar;40;-2\r\n' ';2;COVID;;\r\n')
    plant(tmp_path, {'list.csv': text.encode('utf-8'), 'img/a/1.png': '', 'img/a/2.png': ''})
    columns = dict(path='Datei', patient='Fall', finding='Befund', age_years='Alter', offset_days='TAG')
    t = read_csv(tmp_path / 'list.csv', tmp_path / 'img', columns,
                 findings={'Gesund': 'No Finding', 'unklar': None}, constants=dict(view='PA', modality='X-ray'), keep=['Alter'])
    check_contract(t)
    assert list(t['finding'].fillna('-')) == ['No Finding', '-', COVID]
    assert list(t['excluded'].fillna('-')) == ['-', '-', str(NO_FILE_NAMED)] and list(t['offset_days'][:2]) == [3, -2]
    assert list(t['Alter'][:2]) == ['40', '40'] and set(t['view']) == {'PA'}


def test_csv_constants_may_be_numbers(tmp_path):
    plant(tmp_path, {'list.csv': 'f\n1.png\n', '1.png': ''})
    t = read_csv('list.csv', tmp_path, dict(path='f'), constants=dict(age_years=50, offset_days=-1, sex='female', official_split='val',
                                                                      patient=7, finding='covid'))
    check_contract(t)
    first = [t[c][0] for c in ('age_years', 'offset_days', 'sex', 'official_split', 'patient', 'finding')]
    assert first == [50, -1, 'F', 'valid', 'csv:7', COVID]
    assert pd.isna(t['view'][0]) and pd.isna(t['modality'][0])
    for column, value in (('age_years', '50+'), ('offset_days', 'soon')):
        with pytest.raises(SourceError, match=f'{column} cannot be read'):
            read_csv('list.csv', tmp_path, dict(path='f'), constants={column: value})


def test_registering_and_asking():
    with pytest.raises(SourceError, match="did you mean 'kaggle_pneumonia'"): read_source('kagle_pneumonia', '.')
    with pytest.raises(CxrError, match='already'): register_source(Source('rsna', 'x', read_rsna))
    register_source(Source('mine', 'Mine', lambda root: read_folder(root)))
    try: assert 'mine' in list(list_sources()['name'])
    finally: del SOURCES['mine']
    assert list_sources()['faults'].sum() == sum(len(s.faults) for s in SOURCES.values()) > 20


# --- hostile metadata ----------------------------------------------------------------------------------------------------

COVID_HEAD = 'patientid,finding,view,modality,folder,filename\n'

@pytest.mark.parametrize('folder, name', [('images', '../../secret.png'), ('images', '/etc/hosts'), ('../..', 'secret.png'),
                                          ('images', 'x/../../../secret.png')])
def test_no_row_of_a_collection_leads_out_of_its_folder(folder, name, tmp_path):
    "A picture from elsewhere on this disk would be read, shown in the inspection, and learned"
    plant(tmp_path, {'secret.png': 'x', 'data/images/a.png': 'x',
                     'data/metadata.csv': COVID_HEAD + f'1,COVID-19,PA,X-ray,images,a.png\n2,COVID-19,PA,X-ray,{folder},{name}\n'})
    with pytest.raises(SourceError, match='1 file name of this collection would lead out of its folder') as e:
        read_covid_chestxray(tmp_path / 'data')
    assert name in str(e.value)
    plant(tmp_path, {'data/metadata.csv': COVID_HEAD + '1,COVID-19,PA,X-ray,images,a.png\n'})
    assert len(used(read_covid_chestxray(tmp_path / 'data'))) == 1
    (tmp_path / 'link').symlink_to(tmp_path / 'data')                        # a link that a person made is their own affair
    assert len(used(read_covid_chestxray(tmp_path / 'link'))) == 1


def test_a_metadata_file_that_was_cut_off_is_not_read_in_part(tmp_path):
    whole = COVID_HEAD + ''.join(f'{i},COVID-19,PA,X-ray,images,{i}.png\n' for i in range(30))
    plant(tmp_path, {'m.csv': whole.rstrip('\n')})
    assert len(read_metadata(tmp_path / 'm.csv')) == 30                      # only the last line break is missing
    plant(tmp_path, {'m.csv': whole[:-25]})
    with pytest.raises(SourceError, match='ends in the middle of row 31, with 2 of 6 fields'): read_metadata(tmp_path / 'm.csv')
    packed = gzip.compress(whole.encode())
    for broken in (packed[:-9], packed[:len(packed) // 2], packed[:20] + bytes(8) + packed[28:], b'no gzip'):
        plant(tmp_path, {'m.csv.gz': broken})
        with pytest.raises(SourceError, match='check the path and that the download is whole'): read_metadata(tmp_path / 'm.csv.gz')


def test_an_unknown_word_names_its_file_and_can_be_made_known(tmp_path, monkeypatch):
    from covid_cxr import core
    plant(tmp_path, {'images/a.png': 'x',
                     'metadata.csv': COVID_HEAD + '1,Coronaphobia,PA,X-ray,images,a.png\n'
                                                  '2,Coronaphobia,PA,X-ray,images,b.png\n3,Gout,PA,X-ray,images,c.png\n'})
    with pytest.raises(VocabularyError) as e: read_covid_chestxray(tmp_path)
    assert str(tmp_path / 'metadata.csv') in str(e.value) and "'Coronaphobia' (2), 'Gout' (1)" in str(e.value)
    assert 'FINDING_WORDS' in str(e.value)
    for w in ('coronaphobia', 'gout'): monkeypatch.setitem(core.FINDING_WORDS, w, 'Other Abnormality')
    assert list(read_covid_chestxray(tmp_path)['finding']) == ['Other Abnormality'] * 3
    plant(tmp_path / 'nih', {'Data_Entry_2017.csv': NIH_HEAD + '1_0.png,Mass|Gizzard,0,1,50,M,PA,9,9,.1,.1\n'})
    with pytest.raises(VocabularyError, match=r'Data_Entry_2017.csv: unknown finding: .Gizzard. \(1\)'):
        read_nih(tmp_path / 'nih', files='ignore')


def test_an_option_that_a_source_does_not_have_is_one_sentence(tmp_path):
    with pytest.raises(SourceError, match="source 'nih' has no option 'flies', did you mean 'files'"):
        read_source('nih', tmp_path, flies='ignore')
    with pytest.raises(SourceError, match="source 'kaggle_pneumonia' has no option 'metadata'.*its options: none"):
        read_source('kaggle_pneumonia', tmp_path, metadata='x.csv')


@needs_data
def test_coronahack_finds_its_images_in_a_folder_of_collections():
    "The csv stands in one folder, its images in the two collections that it repeats"
    t = read_source('coronahack', DATA)
    alone = read_source('coronahack', DATA / 'coronahack')
    assert len(t) == len(alone) == 6197 and not len(used(alone))
    named = read_coronahack(DATA / 'coronahack', [DATA / 'chest-xray-pneumonia', DATA / 'covid-chestxray-dataset'])
    assert list(used(t)['path']) == list(used(named)['path']) and len(used(t)) == 5907


# --- one person, one spelling --------------------------------------------------------------------------------------------

def _csv_with(tmp_path, ids):
    plant(tmp_path, {'t.csv': 'file,pid\n' + ''.join(f'{i}.png,{p}\n' for i, p in enumerate(ids))})
    return read_csv('t.csv', tmp_path, dict(path='file', patient='pid'), files='ignore')


def _covid_with(tmp_path, ids):
    rows = ''.join(f'{p},COVID-19,PA,{i}.png\n' for i, p in enumerate(ids))
    plant(tmp_path, {'metadata.csv': 'patientid,finding,view,filename\n' + rows})
    return read_covid_chestxray(tmp_path, files='ignore')


def _nih_with(tmp_path, ids):
    rows = ''.join(f'{i:08d}_000.png,Mass,0,{p},60,M,PA\n' for i, p in enumerate(ids))
    plant(tmp_path, {'Data_Entry_2017.csv': NIH_HEAD.split(',Original')[0] + '\n' + rows})
    return read_nih(tmp_path, files='ignore')


def _actualmed_with(tmp_path, ids):
    rows = ''.join(f'{p},,,,COVID-19,PA,X-ray,{i}.png\n' for i, p in enumerate(ids))
    plant(tmp_path, {'metadata.csv': 'patientid,offset,sex,age,finding,view,modality,imagename\n' + rows, 'images/0.png': ''})
    return read_actualmed(tmp_path, files='ignore')


def _folder_with(tmp_path, ids):
    return read_folder(plant(tmp_path, {f'COVID/{p}_{i}.png': '' for i, p in enumerate(ids)}), patient=r'/(.*)_\d')


READERS = [_csv_with, _covid_with, _nih_with, _actualmed_with, _folder_with]
REFUSED, ONE, TWO = 'written in more than one way', 1, 2


@pytest.mark.parametrize('read', READERS)
@pytest.mark.parametrize('ids, right', [
    (['1', '1.0'], ONE), (['1', '1.00', '1.0'], ONE), (['-1', '-1.0'], ONE), (['1', '001'], REFUSED), (['1.0', '01'], REFUSED),
    (['P1', 'p01'], REFUSED), (['pat-7', 'Pat-7'], REFUSED), (['patient_1', 'patient_001.0'], REFUSED), (['1.2E+11'], 'has rounded'),
    (['1', '10'], TWO), (['331a', '331b'], TWO), (['1.2.840.01', '1.2.840.1'], TWO), (['1.5', '15'], TWO), (['A1', 'B1'], TWO),
    (['0', '00.1'], TWO)])
def test_one_person_has_one_spelling(read, ids, right, tmp_path):
    "Otherwise a split trains on 1 and tests on 001"
    if read is _nih_with and right == REFUSED and ids[1][0] in '01': right = ONE       # there the ids are numbers, filled up with zeros
    if isinstance(right, str):
        with pytest.raises(SourceError, match=right): read(tmp_path, ids)
    else: assert read(tmp_path, ids)['patient'].nunique() == right


def test_numbers_in_other_columns(tmp_path):
    "Codes of findings, targets, ages and file names that a spreadsheet turned into 1.0"
    plant(tmp_path, {'t.csv': 'file,dx,age,day\n17.0,1.0,61.0,3.0\n18,1,61,3\n', '17.png': '', '18.png': ''})
    t = read_csv('t.csv', tmp_path, dict(path='file', finding='dx', age_years='age', offset_days='day'), findings={'1': 'Effusion'})
    assert len(used(t)) == 2 and set(t['finding']) == {'Effusion'} and set(t['age_years']) == {61} and set(t['offset_days']) == {3}
    for target in ('1', '1.0', '1.00'):
        plant(tmp_path, {'stage_2_train_labels.csv': f'patientId,Target\na,{target}\nb,0\n'})
        assert list(read_rsna(tmp_path, files='ignore')['finding'].fillna('-')) == ['Lung Opacity', '-']


@pytest.mark.parametrize('files, words, headers', [
    ({'stage_2_train_labels.csv': 'patientId,Target\na,yes\n'}, "stage_2_train_labels.csv: unknown Target: 'yes'", False),
    ({'pneumonia-challenge-dataset-mappings_2018.json': '[{"subset'}, 'mappings_2018.json is damaged', False),
    ({'pneumonia-challenge-dataset-mappings_2018.json': '{"a": 1}'}, 'mappings_2018.json is damaged', False),
    ({'stage_2_train_images/a.dcm': ''}, 'a.dcm has no DICOM header', True),
    ({'stage_2_train_images/a.dcm': b'\0' * 128 + b'DICMxx'}, 'a.dcm', True),
    ({'stage_2_train_images/a.dcm': b'GIF89a' * 99}, 'a.dcm has no DICOM header', True)])
def test_damaged_files_of_rsna_are_named(files, words, headers, tmp_path):
    plant(tmp_path, {'stage_2_train_labels.csv': 'patientId,Target\na,1\n', **files})
    try: read_rsna(tmp_path, headers=headers, files='require' if headers else 'ignore')
    except SourceError as e: assert words in str(e)
    except VocabularyError as e: assert words in str(e)
    else: assert words == 'a.dcm', 'an empty data set says nothing and is read'


# --- tables that would lose rows or columns ------------------------------------------------------------------------------

HEAD = 'file,note,dx\n'


@pytest.mark.parametrize('text, words', [
    (HEAD + '1,"a,x\n2,b,x\n3,c,x\n', 'line 2 opens a quote'),                   # to the end of the file
    (HEAD + '1,"a,x\n2,"b",x\n3,c,x\n', 'line 2 opens a quote'),                 # until the next quote
    (HEAD + '1,a,x\n2,b,"x\n3,c,"y"\n4,d,x\n', 'line 3 opens a quote'),          # in the last column
    (HEAD + '1,a,x\n2,b,x\n3,c,"x', 'line 4 opens a quote'),                     # in the last row
    (HEAD.replace('\n', '\r\n') + '1,"a,x\r\n2,b,x\r\n', 'line 2 opens a quote'),
    ('sep=;\nfile;note\n1;"a\n2;b\n', 'line 3 opens a quote'),
    ('"file,note\n1,a\n', 'line 1 opens a quote'),                               # in the header
    (b'PK\x03\x04 workbook', 'is a workbook'), (b'\x89PNG\0\0', 'no text'), (b'\xff\xfea', 'UTF-16 and is not'),
    ('a,A\n1,2\n', "2 columns 'a' that differ"), ('a,b,a\n1,2,1\n1,2,\n', 'first in row 3')])
def test_a_table_that_would_lose_rows_is_refused(text, words, tmp_path):
    p = tmp_path / 't.csv'
    p.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SourceError, match=words): read_metadata(p)


@pytest.mark.parametrize('text', [
    HEAD + '1,"a\nb",x\n', HEAD + '1,"a, ""b""\n\nc",x\n', HEAD + '1,a "b" c,x\n', HEAD + '1,5" tube,x\n', HEAD + '1,"a"b,x\n2,c,x\n',
    HEAD + '1,a,"x"', HEAD + '1,a,""\n', 'sep=,\n' + HEAD + '1,a,x\n', '"sep=,"\n' + HEAD + '1,a,x\n', '\n\n' + HEAD + '1,a,x\n'])
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
def test_odd_but_whole_tables_are_read(text, encoding, tmp_path):
    p = tmp_path / 't.csv'
    p.write_bytes(text.encode(encoding))
    t = read_metadata(p, ['file', 'note', 'dx'])
    assert t['file'][0] == '1' and len(t) == text.count('\n2,') + 1


# --- folders -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('links', [
    {'COVID/all': '..'}, {'COVID/a': '.', 'COVID/b': '.'}, {'COVID/a': '../Normal', 'Normal/b': '../COVID'}, {'all': 'COVID'},
    {'COVID/up': '../..'}, {'COVID/deep/er': '../..'}, {'x': 'y', 'y': 'x'}, {'COVID/gone': 'nowhere'}])
def test_a_folder_is_entered_once(links, tmp_path):
    "Whatever leads back, every image has one row and the class of the folder where it lies"
    own = plant(tmp_path / 'own', {f'{c}/{c}{i}.png': '' for c in ('COVID', 'Normal') for i in range(2)})
    plant(tmp_path, {'beside/z.png': ''})
    for name, target in links.items():
        (own / name).parent.mkdir(exist_ok=True)
        (own / name).symlink_to(target)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        t = read_folder(own)
    assert sorted(t['image_id']) == [f'folder:{c}/{c}{i}.png' for c in ('COVID', 'Normal') for i in range(2)]
    loops = not {'x', 'COVID/gone'} & set(links)                       # those two lead to no folder at all
    assert any('not followed' in str(w.message) for w in said) == loops


def test_a_link_to_another_place_is_followed(tmp_path):
    plant(tmp_path, {'store/a.png': '', 'store/more/b.png': '', 'own/Normal/c.png': ''})
    (tmp_path / 'own' / 'COVID').symlink_to('../store')
    assert read_folder(tmp_path / 'own')['image_id'].tolist() == ['folder:COVID/a.png', 'folder:COVID/more/b.png', 'folder:Normal/c.png']


@pytest.mark.parametrize('mask', ['COVID/masks/a.png', 'COVID/Mask/a.png', 'lung-masks/a.png', 'COVID/a_mask.png', 'COVID/leftMask/a.png',
                                  'COVID/lungVAE-masks/a_mask.png'])
def test_a_mask_is_no_image(mask, tmp_path):
    plant(tmp_path, {'COVID/a.png': '', 'Normal/masked_man.png': '', mask: ''})
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert len(read_folder(tmp_path)) == 2


@pytest.mark.parametrize('name, split', [('val', 'valid'), ('validation', 'valid'), ('Validation', 'valid'), ('training', 'train'),
                                         ('testing', 'test'), ('TEST', 'test')])
def test_names_of_splits(name, split, tmp_path):
    assert set(read_folder(plant(tmp_path / 'f', {f'{name}/COVID/a.png': ''}))['official_split']) == {split}
    plant(tmp_path, {'t.csv': f'path,official_split\na.png,{name}\n'})
    assert set(read_csv('t.csv', tmp_path, files='ignore')['official_split']) == {split}
    kaggle = plant(tmp_path / 'k', {'train/NORMAL/IM-0001-0001.jpeg': '', f'{name}/NORMAL/IM-0115-0001.jpeg': ''})
    assert split in set(read_kaggle_pneumonia(kaggle)['official_split'])


def test_a_name_that_no_csv_can_hold_is_refused_before_the_work(tmp_path):
    odd = os.fsdecode(b'r\xf6ntgen.png')
    try: plant(tmp_path, {f'own/COVID/{odd}': ''})
    except OSError: pytest.skip('this file system knows only UTF-8 names')
    with pytest.raises(SourceError, match='1 file name of this collection cannot be written as UTF-8'): read_folder(tmp_path / 'own')
    plant(tmp_path / 'rad', {f'COVID/images/{odd}': '', 'Normal/images/a.png': ''})
    with pytest.raises(SourceError, match='rename the files'): read_covid_radiography(tmp_path / 'rad')


@pytest.mark.parametrize('name', sorted(ROWS))
def test_a_relative_folder_is_understood_elsewhere(name, trees, tmp_path, monkeypatch):
    root, options = trees[name]
    right = read_source(name, root, **options)
    monkeypatch.chdir(root)
    t = read_source(name, '.', **options)
    monkeypatch.chdir(tmp_path.parent)
    assert t['path'].dropna().map(os.path.isabs).all() and (t['path'].dropna() == right['path'].dropna()).all()


@pytest.mark.parametrize('name', ['sub\\f.png', '.\\sub\\f.png', 'sub\\F', 'sub/f.png'])
def test_a_path_from_windows_is_found(name, tmp_path):
    plant(tmp_path, {'t.csv': f'path\n{name}\n', 'sub/f.png': ''})
    assert len(used(read_csv('t.csv', tmp_path))) == 1
    root = plant(tmp_path / 'c', {'metadata.csv': 'patientid,finding,view,filename\n1,COVID-19,PA,..\\..\\t.csv\n', 'images/a.png': ''})
    with pytest.raises(SourceError, match='out of its folder'): read_covid_chestxray(root)
