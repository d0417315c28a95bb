package nftables

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"signalbox/proxier"
)

// kubeProxyTable is the table of kube-proxy's nftables mode.
const kubeProxyTable = "kube-proxy"

// Cleanup removes this mode's table of the family, and nothing else. It is no
// error if there is none, and then nothing is written.
func Cleanup(f proxier.Family) error { return removeTable(f, tableName) }

// CleanupKubeProxy removes the table of kube-proxy's nftables mode likewise.
func CleanupKubeProxy(f proxier.Family) error { return removeTable(f, kubeProxyTable) }

func removeTable(f proxier.Family, name string) error {
	w, err := dial(familyOf(f), name)
	if err != nil {
		return err
	}
	defer w.close()
	w.DeleteTable()
	err = w.flush()
	if errors.Is(err, unix.EINVAL) { // of nfnetlink, which knows no nf_tables
		return unsupported(f, "nf_tables", "the kernel needs CONFIG_NF_TABLES (module nf_tables)", err)
	}
	if err != nil {
		return fmt.Errorf("delete table %s of %s: %w", name, f, err)
	}
	return nil
}
