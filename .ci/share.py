"""A plugin of pytest by which several processes share one run: each test is run by the first that takes it.

SHARE=DIRECTORY, where a test is taken by making a file of its name; SHARE=alone runs only what changes a setting of
the whole kernel, which is nothing to be done beside others."""
import hashlib
import os

# in the names of all that call kernel_setting
ALONE = 'a_queue_of_events_that_ran_over', 'lost_events_are_made_good', 'changed_in_place_and_kept', 'a tiny queue'
LONGEST = 'test_silence_is_noticed_within_45_seconds_with_data_on_the_way_and_without'
SHARE = os.environ['SHARE']


def pytest_collection_modifyitems(items):
    items[:] = [item for item in items if any(words in item.name for words in ALONE) == (SHARE == 'alone')]
    items.sort(key=lambda item: item.name != LONGEST)


def pytest_runtest_protocol(item):
    if SHARE != 'alone':
        try:
            open(os.path.join(SHARE, hashlib.sha1(item.nodeid.encode()).hexdigest()), 'x').close()
        except FileExistsError:
            return True                 # another process has it
