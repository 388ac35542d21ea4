"""MMEB-V2: the 78 data sets (`registry`), where their files lie (`files`) and how they are read
(`image`, `visdoc`, `video`, `moments`), one task at a time (`load`)."""
