"""What a training goes on from."""

from pathlib import Path

from mmengine.config import Config

from mmubn.cli import resume


def test_a_checkpoint_on_another_backend(monkeypatch):
    """As ``CheckpointHook(out_dir='s3://...')`` writes them: mmengine reads them from there."""
    source = 's3://bucket/run/epoch_3.pth'
    Path('last_checkpoint').write_text(source)
    read = {source: dict(meta=dict(seed=3))}
    monkeypatch.setattr(resume, 'read_checkpoint', lambda key, path: read[path])
    settings = resume.resume_settings(Config(dict(work_dir='.')), newest=True)
    assert settings == {'load_from': source, 'randomness.seed': 3}
