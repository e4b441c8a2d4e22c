"""Floor 1, what comes in from files and goes out to them.

- `images`: a folder of pictures -> [N, H, W, 3] float32 in [-1, 1], and back to PNG
- `decode`: one picture file of any kind -> RGB
- `tokens`: text -> token ids, the byte-pair encoding of CLIP
- `token_files`: the files of a tokenizer folder
"""
