"""Random damage to the files of killed stores: is each key equal, refused or reported, and never lost in silence?"""
