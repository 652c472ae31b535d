# VGG for 32x32 images: its features are 1x1, and two hidden layers of 4096 follow.
model = dict(
    type='ImageClassifier',
    _scope_='mmpretrain',
    backbone=dict(type='VGG'),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='StackedLinearClsHead',
        in_channels=512,
        mid_channels=[4096, 4096],
        dropout_rate=0.5,
        loss=dict(type='CrossEntropyLoss'),
    ),
)
