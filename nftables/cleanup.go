package nftables

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"signalbox/nft"
	"signalbox/nft/access"
	"signalbox/proxier"
	"signalbox/proxier/plan"
)

// Cleanup removes this mode's table of the family, and nothing else. It is no
// error if there is none, and then nothing is written and removed is false.
func Cleanup(f plan.Family) (removed bool, err error) {
	w, err := dial(nft.FamilyOf(f), tableName)
	if err != nil {
		return false, err
	}
	defer w.Close()
	removed = w.DeleteTable()
	err = access.Commit(w)
	if errors.Is(err, unix.EINVAL) { // of nfnetlink, which knows no nf_tables
		return false, &proxier.UnsupportedError{Mode: Mode, Family: f, Missing: "nf_tables", Remedy: "the kernel needs CONFIG_NF_TABLES (module nf_tables)", Err: err}
	}
	if err != nil {
		return false, fmt.Errorf("delete table %s of %s: %w", tableName, f, err)
	}
	return removed, nil
}
