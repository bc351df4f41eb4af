# What the parents may do: be managed by Session Manager, read their artefacts, write their backups, keep tables and bundles in the
# bucket, and ask the parties' keys for decryption to an attested enclave. Nothing else.

data "aws_iam_policy_document" "assume" {
  statement {
    actions = ["sts:AssumeRole"]

    principals {
      type        = "Service"
      identifiers = ["ec2.amazonaws.com"]
    }
  }
}

resource "aws_iam_role" "parent" {
  name               = "${var.name}-parent"
  description        = "Parent instance of Parley"
  assume_role_policy = data.aws_iam_policy_document.assume.json
}

resource "aws_iam_role_policy_attachment" "session_manager" {
  role       = aws_iam_role.parent.name
  policy_arn = "arn:${data.aws_partition.this.partition}:iam::aws:policy/AmazonSSMManagedInstanceCore"
}

data "aws_iam_policy_document" "parent" {
  statement {
    sid       = "ReadArtefacts"
    actions   = ["s3:GetObject"]
    resources = ["${aws_s3_bucket.this.arn}/artefacts/*"]
  }

  statement {
    sid       = "Backups"
    actions   = ["s3:GetObject", "s3:PutObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]
    resources = ["${aws_s3_bucket.this.arn}/backup/*"]
  }

  # The mirror of the ciphertext forgets what the coordinator has deleted; copies of the database it cannot delete.
  statement {
    sid       = "MirrorBlobs"
    actions   = ["s3:DeleteObject"]
    resources = ["${aws_s3_bucket.this.arn}/backup/blobs/*"]
  }

  statement {
    sid       = "ListBackups"
    actions   = ["s3:ListBucket"]
    resources = [aws_s3_bucket.this.arn]

    condition {
      test     = "StringLike"
      variable = "s3:prefix"
      values   = ["backup/*"]
    }
  }

  # What coordinator/parley_coordinator/s3.py asks for, as coordinator/README.md lists it.
  dynamic "statement" {
    for_each = var.database == null ? [] : ["blobs"]

    content {
      sid       = "Blobs"
      actions   = ["s3:AbortMultipartUpload", "s3:DeleteObject", "s3:GetObject", "s3:ListMultipartUploadParts", "s3:PutObject"]
      resources = ["${aws_s3_bucket.this.arn}/${statement.value}/*"]
    }
  }

  # Without a condition on the prefix: S3 would say that an object which is not there is forbidden.
  dynamic "statement" {
    for_each = var.database == null ? [] : [aws_s3_bucket.this.arn]

    content {
      sid       = "ListBlobs"
      actions   = ["s3:ListBucket", "s3:ListBucketMultipartUploads"]
      resources = [statement.value]
    }
  }

  statement {
    sid       = "BucketKey"
    actions   = ["kms:Decrypt", "kms:GenerateDataKey"]
    resources = [aws_kms_key.bucket.arn]

    condition {
      test     = "StringEquals"
      variable = "kms:ViaService"
      values   = ["s3.${var.region}.amazonaws.com"]
    }
  }

  # The keys' own policies decide; this only lets a request out, and only one that carries an attestation document.
  dynamic "statement" {
    for_each = length(var.party_keys) == 0 ? [] : [var.party_keys]

    content {
      sid       = "PartyKeys"
      actions   = ["kms:Decrypt"]
      resources = statement.value

      condition {
        test     = "Null"
        variable = "kms:RecipientAttestation:PCR0"
        values   = ["false"]
      }
    }
  }

  # Where a party would rather let a role of its own be assumed. What that role may do, and who may assume it, is the party's to say.
  dynamic "statement" {
    for_each = length(var.party_roles) == 0 ? [] : [[for role in var.party_roles : role.arn]]

    content {
      sid       = "PartyRoles"
      actions   = ["sts:AssumeRole"]
      resources = statement.value
    }
  }
}

resource "aws_iam_role_policy" "parent" {
  name   = "parent"
  role   = aws_iam_role.parent.id
  policy = data.aws_iam_policy_document.parent.json
}

resource "aws_iam_instance_profile" "parent" {
  name = "${var.name}-parent"
  role = aws_iam_role.parent.name
}
